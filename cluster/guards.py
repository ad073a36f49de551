"""Health guards: what a run shows that a healthy one does not, and what is then done (`training.guards`).

Those that need the learner's forward or gradient are asked in `learner/rank.py`, with the limits that are made here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from configs.schema import GUARDS, Config
from learner.alarms import NO_LIMITS, PREFIX, Alarms, Limits

WINDOW = 32  # steps of a running median: it follows a run's drift, and takes on a new level after half of them
KNOWN = 8  # steps before there is a median: the first updates are the wildest
SPIKE = 10.0  # times the median; the largest of healthy runs was 3 times it
COLLAPSE = 0.05  # of the median; the fastest healthy learner fell to 0.18 of it
MOST_ERRORS = 0.5  # of the verdicts: what is left to learn from is then less than the noise
FLAT_STEPS = 5  # in a row: in a batch of four groups chance alone makes one such step, now and then two

FAULTS = {
    "nan": "the loss or the gradient is no number",
    "grad_norm": f"the gradient's norm is over {SPIKE:g} times its running median",
    "entropy": f"the entropy fell under {COLLAPSE:g} of its running median",
    "truncated": "every completion of the batch is truncated",
    "logprob_diff": "the rollout workers' log-probs are not the learner's",
    "verifier_errors": f"more than {MOST_ERRORS:.0%} of the verdicts are errors",
    "reward_flat": f"no group had different rewards for {FLAT_STEPS} steps or more, and not because all is solved",
}
SHOWN = {
    "grad_norm": "policy/grad_norm",
    "entropy": "policy/entropy",
    "truncated": "rollout/truncated",
    "logprob_diff": "rollout/logprob_diff",
    "verifier_errors": "verdict/error",
    "reward_flat": "reward/mean",
}


@dataclass
class Fired:
    """How often a guard fired (updates that go wrong count each), and what it saw last, at which step."""

    times: int = 0
    step: int = 0
    saw: str = ""


class Guards:
    """All that the guards know comes from the lines of metrics.jsonl, which `RunFolder.rewind` keeps exact: a run that
    was resumed, or went back to a checkpoint, decides as the run that was left alone."""

    def __init__(self, config: Config, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._entropies: deque[float] = deque(maxlen=WINDOW)
        self._spread = False  # whether a group ever had different rewards
        self._flat = 0  # steps in a row without any
        self._fired = {guard: Fired() for guard in GUARDS}
        for line in lines:
            self.observe(line)

    def limits(self) -> Limits:
        """What the next update is held to. A norm that is not even clipped is no spike."""
        learner, limits = self._config.learner, NO_LIMITS
        if len(self._norms) >= KNOWN:
            limits = replace(limits, grad_norm=max(SPIKE * median(self._norms), learner.max_grad_norm))
        if len(self._entropies) >= KNOWN and not learner.supervised:  # who imitates may grow as sure as can be
            limits = replace(limits, entropy=COLLAPSE * median(self._entropies))
        return limits

    def look(self, sampled: Mapping[str, float]) -> Alarms:
        """Alarms over a sampling batch, from its metrics; RunError where the run is to stop."""
        alarms = Alarms(self._config.training.guards)
        if sampled["rollout/truncated"] == 1.0:
            longest = self._config.rollout.max_completion_tokens
            alarms.raised(
                "truncated",
                f"Every completion of this step was cut off at rollout.max_completion_tokens={longest}, expected some "
                "that end by themselves: no answer was finished. Raise it, or look at the step's rollouts.",
            )
        errors = sampled["verdict/error"]
        if errors > MOST_ERRORS:
            alarms.raised(
                "verifier_errors",
                f"{errors:.0%} of this step's verdicts are errors, more than {MOST_ERRORS:.0%}. The "
                "verifier's child dies on these answers: raise rewards.memory_mb, or look at the step's rollouts.",
            )
        flat = self._flat + 1 if _without_spread(sampled) else 0
        if self._spread and flat >= FLAT_STEPS:
            alarms.raised(
                "reward_flat",
                f"For {flat} steps no group had completions of different rewards, as there were before, and "
                f"not all are right (mean reward {sampled['reward/mean']:.3g}): nothing can be learnt. Look at the "
                "rollouts for one answer to everything, and at the rewards; go back to a checkpoint.",
            )
        return alarms

    def observe(self, line: Mapping[str, Any]) -> list[str]:
        """Take in a line of metrics.jsonl; what to say of it: a guard's first time, its 10th, its 100th."""
        if line.get("policy/grad_norm"):  # of groups without spread it is 0, which says nothing of the others
            self._norms.append(line["policy/grad_norm"])
        if "policy/entropy" in line:
            self._entropies.append(line["policy/entropy"])
        if "reward/flat_groups" in line:
            self._spread |= line["reward/flat_groups"] < 1.0
            self._flat = self._flat + 1 if _without_spread(line) else 0
        return [text for guard in GUARDS if PREFIX + guard in line if (text := self._count(guard, line))]

    def _count(self, guard: str, line: Mapping[str, Any]) -> str | None:
        fired, before = self._fired[guard], self._fired[guard].times
        fired.times += int(line[PREFIX + guard])
        fired.step = int(line["step"])
        shown = SHOWN.get(guard)
        value = f" ({shown} {line[shown]:.3g})" if shown and shown in line else ""
        fired.saw = f"{FAULTS[guard]}{value}"
        if before and len(str(before)) == len(str(fired.times)):
            return None
        action = self._config.training.guards[guard]
        return f"guard {guard} at step {fired.step}, {action}: {fired.saw}; {fired.times} so far"

    def facts(self) -> dict[str, Any]:
        """What status.json says of each guard: what it does, how often it fired, and what it saw last."""
        actions = self._config.training.guards
        return {
            guard: {"action": actions[guard], "times": fired.times}
            | ({"saw": fired.saw, "step": fired.step} if fired.times else {})
            for guard, fired in self._fired.items()
        }


def _without_spread(metrics: Mapping[str, float]) -> bool:
    """Whether no group has different rewards, and not because every answer is right."""
    return metrics["reward/flat_groups"] == 1.0 and metrics["verdict/correct"] < 1.0
