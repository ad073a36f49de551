"""The training loop: sample, verify, update, sync; evaluation, checkpoints and telemetry hang on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from actors.engine import Sampling
from actors.rollout_worker import SampleRequest
from actors.sampling import sample_and_verify
from cluster.checkpoints import Checkpoints, LoopState
from cluster.interrupts import Interrupts
from cluster.metrics import group_metrics
from cluster.progress import Display
from cluster.run_folder import RunFolder
from cluster.start import Actors
from cluster.tensorboard import TensorBoard
from configs.errors import RunError
from configs.schema import Config
from data.hashing import stable_hash
from data.records import Group, Prompt
from data.sampler import PromptSampler
from evaluation.accuracy import Accuracy, measure_accuracy
from learner.batching import Sequence
from learner.from_groups import sequences_of


@dataclass
class Run:
    """Everything a running loop holds."""

    config: Config
    folder: RunFolder
    actors: Actors
    sampler: PromptSampler
    held_out: list[Prompt]
    checkpoints: Checkpoints
    tensorboard: TensorBoard | None
    display: Display
    version: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a loop ended: steps done, first and last evaluation, and the exit code of an interruption."""

    step: int
    before: Accuracy | None
    after: Accuracy | None
    exit_code: int | None


def train_loop(run: Run, done: int, interrupts: Interrupts) -> Outcome:
    """Steps `done` + 1 to training.steps. On-policy: every batch is sampled with the newest weights."""
    config = run.config
    before = evaluate(run, 0) if done == 0 else None
    after = before
    for step in range(done + 1, config.training.steps + 1):
        if interrupts.exit_code is not None:
            return _interrupted(run, step - 1, before, after, interrupts.exit_code)
        train_step(run, step)
        last = step == config.training.steps
        if last or (config.evaluation.every and step % config.evaluation.every == 0):
            after = evaluate(run, step)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            run.checkpoints.begin(run.actors.learner, loop_state(run, step))
    run.checkpoints.poll(run.actors.learner, wait=True)
    return Outcome(config.training.steps, before, after, None)


def train_step(run: Run, step: int) -> None:
    """One step as the data sees it (DESIGN: sample, verify, order, learn, push)."""
    config, clock = run.config, Clock()
    prompts = run.sampler.take(config.rollout.prompts_per_batch)
    sampled = sample_and_verify(
        run.actors.rollouts,
        run.actors.verifiers,
        prompts,
        sample_request(config),
        config.rollout.deadline_seconds,
    )
    clock.add("sample", sampled.sample_seconds)
    clock.add("verify", sampled.verify_seconds)
    run.folder.write_rollouts(step, sampled.groups)
    check_verdicts(sampled.groups, config.rewards.max_error_rate)
    groups = shuffled(sampled.groups, config.training.seed, step) if config.rewards.shuffle else sampled.groups
    clock.lap()
    learned = learn(run.actors.learner, config, groups)
    run.version += config.updates_per_batch
    clock.add("update", clock.lap())
    run.actors.learner.sync_weights()
    clock.add("sync", clock.lap())
    run.checkpoints.poll(run.actors.learner)
    metrics = {**group_metrics(sampled.groups), **learned, "policy/version": float(run.version)}
    report(run, step, {**metrics, **clock.metrics(metrics["tokens/sampled"])})


class Updates(Protocol):
    """What `learn` needs of a learner: a group of ranks, or one rank in this process (replay)."""

    def update(self, sequences: list[Sequence], on_policy: bool) -> dict[str, float]: ...

    def with_old_logprobs(self, sequences: list[Sequence]) -> list[Sequence]: ...


def learn(learner: Updates, config: Config, groups: list[Group]) -> dict[str, float]:
    """The optimizer steps of one sampling batch; metrics are means over them."""
    sequences = sequences_of(groups)
    size = config.completions_per_update
    if config.updates_per_batch > 1:
        sequences = learner.with_old_logprobs(sequences)
    starts = range(0, len(sequences), size)
    updates = [learner.update(sequences[first : first + size], on_policy=first == 0) for first in starts]
    means = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    # Later updates of a batch are off-policy: only the first compares like with like.
    return {**means, **{name: value for name, value in updates[0].items() if name.startswith("rollout/")}}


def sample_request(config: Config) -> SampleRequest:
    sampling = Sampling(config.rollout.temperature, config.rollout.max_completion_tokens)
    return SampleRequest(config.rollout.completions_per_prompt, sampling, config.training.seed)


def evaluate(run: Run, step: int) -> Accuracy:
    """Accuracy on the held-out problems, written and said."""
    accuracy = measure_accuracy(run.actors.rollouts, run.actors.verifiers, run.held_out, run.config)
    record(run, step, accuracy.metrics())
    run.display.say(f"held-out accuracy after step {step}: {accuracy}")
    return accuracy


def report(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    record(run, step, metrics)
    run.display.step(step, metrics)
    run.folder.write_status("running", step=step, steps=run.config.training.steps, version=run.version)


def record(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    run.folder.append_metrics(step, metrics)
    if run.tensorboard is not None:
        run.tensorboard.write(step, metrics)


def loop_state(run: Run, step: int) -> LoopState:
    cluster, learner = run.config.cluster, run.config.learner
    return LoopState(step, run.sampler.cursor, run.version, cluster.learner_ranks, learner.zero_stage)


def check_verdicts(groups: list[Group], limit: float) -> None:
    """RunError if too many completions could not be judged."""
    outcomes = [verdict.outcome for group in groups for verdict in group.verdicts]
    errors = outcomes.count("error") / len(outcomes)
    if errors > limit:
        raise RunError(
            f"{errors:.0%} of this step's verdicts are errors, more than rewards.max_error_rate={limit:g}. The "
            "verifier's child dies on these answers: raise rewards.memory_mb, or look at the step's rollouts."
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
    newest = run.checkpoints.newest()
    if step > 0 and (newest is None or newest.name != f"step_{step:06d}"):
        run.checkpoints.begin(run.actors.learner, loop_state(run, step))
    run.checkpoints.poll(run.actors.learner, wait=True)
    return Outcome(step, before, after, exit_code)
