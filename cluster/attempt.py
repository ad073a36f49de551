"""One attempt at a run: a set of actors, from their start to the end of the run or of one that cannot be replaced."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from actors.restarts import Restarts
from actors.sampling import Flight, OnDemand, Sampled, sample_and_verify
from actors.stream import SampleStream, StreamOptions
from cluster.account import Account
from cluster.checkpoints import BUFFER, Checkpoints, LoopState
from cluster.curation import make_sampler
from cluster.guards import Guards
from cluster.interrupts import Interrupts
from cluster.learner_group import LearnerLost
from cluster.loop import Outcome, Run, sample_request, train_loop, train_step
from cluster.materials import Materials
from cluster.optimal_values import RewardFile, beside_dataset, optimal_values
from cluster.placement import Placement
from cluster.progress import Display
from cluster.reference import ReferenceResets, References
from cluster.run_folder import RunFolder
from cluster.start import Actors, connect_weights, start_actors
from cluster.supervised import supervised_step
from cluster.tensorboard import TensorBoard
from cluster.turns import Turns
from configs.schema import Config
from data.hashing import stable_hash
from data.records import Prompt
from data.rollouts import read_groups
from data.sampler import PromptSampler
from learner.from_groups import OptimalValues

BEFORE_THE_START = -1  # the step to go back to when not even the evaluation before the first is kept


@dataclass(frozen=True)
class Start:
    """Where an attempt begins: at a checkpoint, with the loop's state in it, or (None) at the initial model.

    again: whether there was an attempt before it.
    """

    checkpoint: Path | None
    state: LoopState
    again: bool = False


def attempt(
    config: Config,
    materials: Materials,
    folder: RunFolder,
    start: Start,
    display: Display,
    placement: Placement,
    account: Account,
    restarts: Restarts,
) -> Outcome:
    """Start the actors, train, end them. LearnerLost if a learner rank dies; RunError as everywhere."""
    state = start.state
    path = start.checkpoint or materials.model_path
    display.say(f"starting vLLM and DeepSpeed with {path}")
    references = References(folder.references, materials.model_path, state.reference)
    actors = start_actors(
        config, placement, path, references.path, state.version, materials.model_path, restarts, display.say
    )
    tensorboard = _tensorboard(config, folder, start)
    try:
        if start.checkpoint:
            actors.learner.call("load_trainer_state", start.checkpoint / "trainer")
        connect_weights(config, actors)
        values = _optimal_values(config, materials, folder, actors, display, state.step)
        sampler = make_sampler(config, materials.train, state.cursor)
        run = Run(
            config=config,
            folder=folder,
            actors=actors,
            sampler=sampler,
            samples=_samples(config, actors, sampler, start),
            account=account,
            restarts=restarts,
            turns=Turns(actors.rollouts, actors.learner, actors.device == "cuda" and placement.kind == "colocated"),
            held_out=materials.held_out,
            checkpoints=Checkpoints(folder.checkpoints, config.checkpoint.keep, folder.changed),
            tensorboard=tensorboard,
            display=display,
            references=references,
            guards=Guards(config, folder.read_metrics()),
            resets=ReferenceResets(config.learner, state.rewards_since_reset),
            values=values,
            version=state.version,
        )
        return _loop(run, state.step)
    finally:
        try:
            if tensorboard is not None:
                tensorboard.close()
        finally:
            actors.stop()


def _optimal_values(
    config: Config, materials: Materials, folder: RunFolder, actors: Actors, display: Display, done: int
) -> OptimalValues | None:
    if config.learner.objective != "a_star_po":
        return None
    if done:  # the initial policy is gone, and the run's folder has its values
        return optimal_values(config, materials.train, folder.optimal_values, None, None, display.say)
    # No part of the run's seed: the values are the problems' own, whichever run sampled them.
    request = replace(
        sample_request(config), completions=config.learner.a_star_samples, seed=stable_hash("optimal values")
    )

    def sample(prompts: list[Prompt]) -> Sampled:
        return sample_and_verify(actors.rollouts, actors.verifiers, prompts, request, config.cluster.deadline_seconds)

    shared = RewardFile(beside_dataset(config, materials.model_path))
    return optimal_values(config, materials.train, folder.optimal_values, shared, sample, display.say)


def _samples(config: Config, actors: Actors, sampler: PromptSampler, start: Start) -> OnDemand | SampleStream:
    """On-policy, sampling on demand; with staleness allowed, a stream that samples ahead."""
    state = start.state
    request, seconds = sample_request(config), config.cluster.deadline_seconds
    if not config.cluster.resolved_max_staleness:
        return OnDemand(actors.rollouts, actors.verifiers, request, sampler, seconds)
    prompts, left = config.rollout.prompts_per_batch, config.training.steps - state.step
    options = StreamOptions(
        max_staleness=config.cluster.resolved_max_staleness,
        prompts_per_batch=prompts,
        last_visit=None if config.rollout.refill_rounds else sampler.cursor + left * prompts,
        deadline_seconds=seconds,
    )
    buffered = read_groups(start.checkpoint / BUFFER) if start.checkpoint and state.pushed else []
    flight = Flight(actors.rollouts, actors.verifiers, request)
    return SampleStream(flight, sampler, state.pushed or (state.version,), options, buffered)


def _loop(run: Run, done: int) -> Outcome:
    run.display.start(done, run.config.training.steps)
    run.turns.sampling()
    try:
        with Interrupts() as interrupts:
            take_step = supervised_step if run.config.learner.supervised else train_step
            try:
                return train_loop(run, done, interrupts, take_step)
            except LearnerLost:
                interrupts.obey()  # rather than start again for somebody who wants it to end
                raise
    finally:
        run.checkpoints.settle()
        run.samples.close()
        run.account.handed_out, _ = run.samples.balance()
        run.display.stop()


def _tensorboard(config: Config, folder: RunFolder, start: Start) -> TensorBoard | None:
    if not config.telemetry.tensorboard:
        return None
    first = BEFORE_THE_START if start.again else None
    return TensorBoard(folder.tensorboard, rewound_to=start.state.step if start.checkpoint else first)
