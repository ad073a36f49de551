"""The training loop: sample, verify, update, sync; evaluation, checkpoints and telemetry hang on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actors.engine import Sampling
from actors.restarts import Restarts
from actors.rollout_pool import Probes
from actors.rollout_worker import SampleRequest
from actors.sampling import OnDemand, Sampled
from actors.stream import SampleStream
from cluster.account import Account
from cluster.checkpoints import BUFFER, Checkpoints, LoopState
from cluster.guards import Guards
from cluster.interrupts import Interrupts
from cluster.metrics import group_metrics, staleness_metrics
from cluster.progress import Display
from cluster.reference import ReferenceResets, References
from cluster.run_folder import RunFolder
from cluster.start import Actors
from cluster.tensorboard import TensorBoard
from cluster.turns import Turns
from cluster.update_metrics import combined
from configs.schema import Config
from data.hashing import stable_hash
from data.records import Group, Prompt
from data.rollouts import write_groups
from data.sampler import PromptSampler
from evaluation.accuracy import Accuracy, measure_accuracy
from learner.alarms import NO_LIMITS, Alarms, Limits
from learner.batching import Sequence
from learner.from_groups import OptimalValues, sequences_of, update_batches
from learner.push_check import check_logprobs, difference, probe_sequences

PROBE_TOKENS = 16
SKIPPED = {"policy/updates": 0.0, "policy/filtered": 0.0}  # the metrics of updates that a guard left out


@dataclass
class Run:
    """Everything a running loop holds."""

    config: Config
    folder: RunFolder
    actors: Actors
    sampler: PromptSampler
    samples: OnDemand | SampleStream
    account: Account
    restarts: Restarts
    turns: Turns
    held_out: list[Prompt]
    checkpoints: Checkpoints
    tensorboard: TensorBoard | None
    display: Display
    references: References
    resets: ReferenceResets
    guards: Guards
    values: OptimalValues | None = None
    version: int = 0
    evaluated: tuple[int, Accuracy] | None = None  # the last evaluation, and the step it was made after
    probes: Probes | None = None  # what the workers sample right after the last push


@dataclass(frozen=True)
class Outcome:
    """How a loop ended: steps done, first and last evaluation, the exit code of an interruption.

    facts: what else status.json says.
    """

    step: int
    before: Accuracy | None
    after: Accuracy | None
    exit_code: int | None
    facts: Mapping[str, Any]


def train_loop(run: Run, done: int, interrupts: Interrupts, take_step: Callable[[Run, int], None]) -> Outcome:
    """Steps `done` + 1 to training.steps, by `train_step` or, supervised, `supervised_step`."""
    config = run.config
    before = evaluate(run, 0) if done == 0 else None
    after = before
    for step in range(done + 1, config.training.steps + 1):
        if interrupts.exit_code is not None:
            return _interrupted(run, step - 1, before, after, interrupts.exit_code)
        take_step(run, step)
        run.account.check(*run.samples.balance())
        run.restarts.progress(step)
        last = step == config.training.steps
        if last or (config.evaluation.every and step % config.evaluation.every == 0):
            after = evaluate(run, step)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            checkpoint(run, step)
    run.checkpoints.poll(run.actors.learner, wait=True)
    return Outcome(config.training.steps, before, after, None, supervision_facts(run))


def train_step(run: Run, step: int) -> None:
    """One step as the data sees it: sample, verify, order, learn, push. Asynchronous, the first three are ahead."""
    config, clock = run.config, Clock()
    sampled = sample_batch(run)
    groups = trained_groups(config, sampled.groups, step)
    run.account.note(trained=len(groups), stale=sampled.dropped, flat=len(sampled.groups) - len(groups))
    clock.add("wait", clock.lap())
    clock.add("sample", sampled.sample_seconds)
    clock.add("verify", sampled.verify_seconds)
    run.folder.write_rollouts(step, sampled.groups)
    seen = group_metrics(sampled.groups)
    alarms = run.guards.look(seen)
    behind = staleness_metrics(sampled, run.version)
    clock.lap()
    run.turns.learning()
    probed = check_push(run, sampled.groups[0].prompt, alarms)
    updated = SKIPPED if alarms.skip else learn(run.actors.learner, config, groups, run.values, run.guards.limits())
    learned = updated | alarms.metrics
    clock.add("update", clock.lap())
    if learned["policy/updates"] or "guard/logprob_diff" in learned:  # weights that did not arrive are sent again
        run.version += int(learned["policy/updates"])
        run.turns.pushing()
        learned |= push(run, sampled.groups[0].prompt)
    run.turns.sampling()
    run.samples.pushed(run.version)
    clock.add("sync", clock.lap())
    run.checkpoints.poll(run.actors.learner)
    metrics = {**seen, **behind, **learned, **probed, "policy/version": float(run.version)}
    if run.resets.due(metrics["reward/mean"]):
        reset_reference(run, step)
    report(run, step, {**metrics, **clock.metrics(metrics["tokens/sampled"])})


def reset_reference(run: Run, step: int) -> None:
    """The current policy becomes the reference (ProRL); references that no checkpoint needs are deleted."""
    needed = [run.references.current, *(state.reference for _, state in run.checkpoints.states())]
    run.actors.learner.reset_reference(run.references.begin(step))
    run.references.keep(needed)
    run.display.say(f"the reference policy is now that of step {step}")


def sample_batch(run: Run) -> Sampled:
    """A sampling batch; with refill rounds (DAPO), as many further prompts as had groups without spread.

    Every round asks for just what is missing, so a group with spread is never thrown away, and waits
    for all it asked for, so short completions are not favoured.
    """
    rollout = run.config.rollout
    batch = run.samples.take(rollout.prompts_per_batch)
    for _ in range(rollout.refill_rounds):
        missing = rollout.prompts_per_batch - sum(not flat(group) for group in batch.groups)
        if not missing:
            break
        run.samples.discard(missing)
        batch += run.samples.take(missing)
    return batch


def trained_groups(config: Config, groups: list[Group], step: int) -> list[Group]:
    """The groups of a step that are trained on, in visit order, from all that were sampled.

    After refill rounds these are the ones with spread, and flat ones only for the places still empty.
    """
    count = config.rollout.prompts_per_batch
    if len(groups) > count:
        spread = [group for group in groups if not flat(group)]
        chosen = spread + [group for group in groups if flat(group)][: count - len(spread)]
        groups = sorted(chosen, key=lambda group: group.prompt.visit)
    return shuffled(groups, config.training.seed, step) if config.rewards.shuffle else groups


def flat(group: Group) -> bool:
    """Whether all rewards of the group are equal, exactly: it then teaches nothing."""
    return len({verdict.total for verdict in group.verdicts}) == 1


class Updates(Protocol):
    """What `learn` needs of a learner: a group of ranks, or one rank in this process (replay)."""

    def update(self, sequences: list[Sequence], on_policy: bool, limits: Limits) -> dict[str, float]: ...

    def with_old_logprobs(self, sequences: list[Sequence]) -> list[Sequence]: ...


def learn(
    learner: Updates,
    config: Config,
    groups: list[Group],
    values: OptimalValues | None = None,
    limits: Limits = NO_LIMITS,
) -> dict[str, float]:
    """The optimizer steps of one sampling batch, each within `limits`; their metrics, `combined`.

    Several updates are off-policy after the first, so pi_old is computed for all of them before it; with one,
    however stale, pi_old is its own forward.
    """
    sequences = sequences_of(groups, config.learner, values)
    if config.updates_per_batch > 1:
        sequences = learner.with_old_logprobs(sequences)
    batches = update_batches(sequences, config.completions_per_update, config.learner.tokens_per_update)
    current = not config.cluster.resolved_max_staleness
    updates: list[dict[str, float]] = []
    for batch in batches * config.learner.epochs_per_batch:
        on_policy = current and not any(update["policy/updates"] for update in updates)
        updates.append(learner.update(batch, on_policy, limits))
    return combined(updates)


def push(run: Run, prompt: Prompt) -> dict[str, float]:
    """The rollout workers get the new weights; asynchronous, each samples this prompt with them for `check_push`.

    Seconds of the push's parts.
    """
    seconds = run.actors.rollouts.push(run.actors.learner.sync_weights)
    if run.config.cluster.resolved_max_staleness:
        probe(run, prompt)
    return seconds


def probe(run: Run, prompt: Prompt) -> None:
    run.probes = run.actors.rollouts.begin_probe(prompt, probe_request(run.config))


def check_push(run: Run, prompt: Prompt, alarms: Alarms) -> dict[str, float]:
    """Asynchronous, no batch is sampled by the newest weights alone: the probes are, which before the first push
    sample this prompt. Their difference from the learner's log-probs, in the place of the batch's; an alarm over the
    limit."""
    if not run.config.cluster.resolved_max_staleness:
        return {}
    if run.probes is None:
        probe(run, prompt)
    assert run.probes is not None
    probes, run.probes = run.actors.rollouts.probed(run.probes), None
    mean, worst = difference(run.actors.learner.with_old_logprobs(probe_sequences(probes, run.version)))
    check_logprobs(alarms, mean, worst, run.config.rollout.logprob_diff, run.version)
    return {"rollout/logprob_diff": mean, "rollout/logprob_diff_max": worst}


def probe_request(config: Config) -> SampleRequest:
    request = sample_request(config)
    tokens = min(PROBE_TOKENS, request.sampling.max_completion_tokens)
    return replace(request, completions=1, sampling=replace(request.sampling, max_completion_tokens=tokens))


def sample_request(config: Config) -> SampleRequest:
    rollout = config.rollout
    sampling = Sampling(rollout.temperature, rollout.max_completion_tokens, rollout.top_k, rollout.top_p)
    return SampleRequest(config.rollout.completions_per_prompt, sampling, config.training.seed)


def evaluate(run: Run, step: int) -> Accuracy:
    """Accuracy on the held-out problems, written and said."""
    with run.samples.paused():
        accuracy = measure_accuracy(run.actors.rollouts, run.actors.verifiers, run.held_out, run.config)
    run.evaluated = (step, accuracy)
    record(run, step, accuracy.metrics())
    run.display.say(f"held-out accuracy after step {step}: {accuracy}")
    return accuracy


def report(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    numbers = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no others
    record(run, step, numbers)
    run.display.step(step, metrics)
    for text in run.guards.observe({"step": step, **numbers}):
        run.display.say(text)
    best = best_facts(run.checkpoints)
    facts = {"step": step, "steps": run.config.training.steps, "version": run.version, **best}
    run.folder.write_status("running", **facts, **supervision_facts(run))


def record(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    run.folder.append_metrics(step, metrics)
    if run.tensorboard is not None:
        run.tensorboard.write(step, metrics)


def supervision_facts(run: Run) -> dict[str, Any]:
    """The account of prompts, how many restarts there were in this process, and what the guards saw."""
    return {"prompts": run.account.facts(), "restarts": run.restarts.total, "guards": run.guards.facts()}


def best_facts(checkpoints: Checkpoints) -> dict[str, Any]:
    """`best` for status.json, once there is one."""
    best = checkpoints.best()
    return {} if best is None else {"best": best.facts()}


def checkpoint(run: Run, step: int) -> None:
    """Begin to save; what was sampled ahead goes with it."""
    pushed, buffered = run.samples.ahead()
    run.checkpoints.begin(
        run.actors.learner,
        replace(loop_state(run, step), pushed=pushed),
        lambda folder: write_groups(folder / BUFFER, buffered) if pushed else None,
    )


def loop_state(run: Run, step: int) -> LoopState:
    cluster, learner = run.config.cluster, run.config.learner
    accuracy = run.evaluated[1] if run.evaluated and run.evaluated[0] == step else None
    return LoopState(
        step=step,
        cursor=run.samples.cursor,
        trained=run.account.trained,
        stale=run.account.stale,
        flat=run.account.flat,
        version=run.version,
        learner_ranks=cluster.learner_ranks,
        zero_stage=learner.zero_stage,
        reference=run.references.current,
        rewards_since_reset=tuple(run.resets.rewards),
        accuracy=accuracy.lenient.value if accuracy else None,
        accuracy_strict=accuracy.strict.value if accuracy else None,
    )


def shuffled(groups: list[Group], seed: int, step: int) -> list[Group]:
    """The control experiment: the same verdicts, dealt out at random over all completions of the step."""
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    order = sorted(range(len(verdicts)), key=lambda i: stable_hash("shuffle", seed, step, i))
    dealt = iter([verdicts[i] for i in order])
    return [replace(group, verdicts=tuple(next(dealt) for _ in group.verdicts)) for group in groups]


class Clock:
    """Seconds per phase of one step."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = self._last = now()
        self._phases: dict[str, float] = {}

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, self._now()
        return self._last - before

    def add(self, phase: str, seconds: float) -> None:
        self._phases[phase] = seconds

    def metrics(self, tokens: float) -> dict[str, float]:
        step = self._now() - self._start
        times = {f"time/{phase}": seconds for phase, seconds in self._phases.items()}
        return {**times, "time/step": step, "tokens/per_second": tokens / step}


def _interrupted(run: Run, step: int, before: Accuracy | None, after: Accuracy | None, exit_code: int) -> Outcome:
    run.checkpoints.poll(run.actors.learner, wait=True)  # this very step's may be under way
    newest = run.checkpoints.newest()
    if step > 0 and (newest is None or newest.name != f"step_{step:06d}"):
        checkpoint(run, step)
    run.checkpoints.poll(run.actors.learner, wait=True)
    return Outcome(step, before, after, exit_code, supervision_facts(run))
