"""One run from Ray's start to its end: materials, folder, actors, loop, and what is said last."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from actors.sampling import Flight, OnDemand, Sampled, sample_and_verify
from actors.stream import SampleStream, StreamOptions
from cluster.checkpoints import Checkpoints, LoopState, load_state
from cluster.curation import make_sampler
from cluster.interrupts import Interrupts
from cluster.loop import Outcome, Run, best_facts, sample_request, train_loop, train_step
from cluster.materials import Materials, prepare
from cluster.optimal_values import RewardFile, beside_dataset, optimal_values
from cluster.placement import Placement, place
from cluster.preflight import check_kv_cache
from cluster.progress import Display
from cluster.ray_session import ray_session
from cluster.reference import ReferenceResets, References
from cluster.run_folder import RunFolder
from cluster.start import Actors, connect_weights, start_actors
from cluster.supervised import supervised_step
from cluster.tensorboard import TensorBoard
from cluster.turns import Turns
from configs.errors import UsageError
from configs.loading import dump_config
from configs.schema import Config
from data.hashing import stable_hash
from data.records import Prompt
from data.sampler import PromptSampler
from learner.from_groups import OptimalValues


@dataclass(frozen=True)
class Resumed:
    """Where a resumed run goes on: its folder, its newest checkpoint, and the loop's state in it."""

    folder: RunFolder
    checkpoint: Path
    state: LoopState


def find_resumed(folder: Path, config: Config) -> Resumed:
    """The newest whole checkpoint of a run, verified. UsageError if there is none to go on from."""
    run_folder = RunFolder(folder.resolve())
    newest = Checkpoints(run_folder.checkpoints, keep=1).newest()
    if newest is None:
        raise UsageError(
            f"--resume {folder}: there is no whole checkpoint in {run_folder.checkpoints}. "
            f"Start a new run with --config {folder / 'config.yaml'}."
        )
    state = load_state(newest)
    if state.step >= config.training.steps:
        raise UsageError(
            f"--resume {folder}: its {state.step} steps are done. To go on, raise training.steps "
            f"(training.steps={2 * state.step}, say)."
        )
    return Resumed(run_folder, newest, state)


def run_session(config: Config, recipe: str, resumed: Resumed | None, display: Display) -> int:
    """Train, new or resumed; returns 0, or 130 / 143 when told to stop."""
    with ray_session(config.cluster.dashboard_port) as dashboard:
        display.say(dashboard)
        placement = place(config)
        display.say(str(placement))
        materials = prepare(config, display.say)
        check_kv_cache(config, materials.model_path)
        folder = _open_folder(config, recipe, resumed)
        display.say(f"run folder: {folder.path}")
        folder.write_status("starting")
        try:
            outcome = _train(config, materials, folder, resumed, display, placement)
        except BaseException as error:  # whatever ends the run is written down, then goes on
            folder.write_status("failed", error=f"{type(error).__name__}: {error}")
            raise
    return _conclude(config, folder, outcome, display)


def _open_folder(config: Config, recipe: str, resumed: Resumed | None) -> RunFolder:
    if resumed is None:
        training = config.training
        return RunFolder.create(training.runs_dir, training.name, recipe, dump_config(config))
    resumed.folder.rewind(resumed.state.step)
    return resumed.folder


def _train(
    config: Config,
    materials: Materials,
    folder: RunFolder,
    resumed: Resumed | None,
    display: Display,
    placement: Placement,
) -> Outcome:
    state = resumed.state if resumed else LoopState(0, 0, 0, config.cluster.learner_ranks, config.learner.zero_stage)
    display.say(f"starting vLLM and DeepSpeed with {resumed.checkpoint if resumed else materials.model_path}")
    start = resumed.checkpoint if resumed else materials.model_path
    references = References(folder.references, materials.model_path, state.reference)
    actors = start_actors(config, placement, start, references.path, state.version)
    tensorboard = _tensorboard(config, folder, state.step)
    try:
        if resumed:
            actors.learner.call("load_trainer_state", resumed.checkpoint / "trainer")
        connect_weights(config, actors)
        values = _optimal_values(config, materials, folder, actors, display, state.step)
        sampler = make_sampler(config, materials.train, state.cursor)
        run = Run(
            config=config,
            folder=folder,
            actors=actors,
            sampler=sampler,
            samples=_samples(config, actors, sampler, state),
            turns=Turns(actors.rollouts, actors.learner, actors.device == "cuda" and placement.kind == "colocated"),
            held_out=materials.held_out,
            checkpoints=Checkpoints(folder.checkpoints, config.checkpoint.keep),
            tensorboard=tensorboard,
            display=display,
            references=references,
            resets=ReferenceResets(config.learner, state.rewards_since_reset),
            values=values,
            version=state.version,
        )
        return _loop(run, state.step)
    finally:
        if tensorboard is not None:
            tensorboard.close()
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


def _samples(config: Config, actors: Actors, sampler: PromptSampler, state: LoopState) -> OnDemand | SampleStream:
    """On-policy, sampling on demand; with staleness allowed, a stream that samples ahead."""
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
    return SampleStream(Flight(actors.rollouts, actors.verifiers, request), sampler, state.version, options)


def _loop(run: Run, done: int) -> Outcome:
    run.display.start(done, run.config.training.steps)
    run.turns.sampling()
    try:
        with Interrupts() as interrupts:
            take_step = supervised_step if run.config.learner.supervised else train_step
            return train_loop(run, done, interrupts, take_step)
    finally:
        run.samples.close()
        run.display.stop()


def _tensorboard(config: Config, folder: RunFolder, done: int) -> TensorBoard | None:
    if not config.telemetry.tensorboard:
        return None
    return TensorBoard(folder.tensorboard, rewound_to=done or None)


def _conclude(config: Config, folder: RunFolder, outcome: Outcome, display: Display) -> int:
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    checkpoint, best = checkpoints.newest(), checkpoints.best()
    steps = {"step": outcome.step, "steps": config.training.steps, **best_facts(checkpoints)}
    if outcome.exit_code is not None:
        again = f"python run_local.py --resume {_shown(folder.path)}" if checkpoint else "nothing to resume yet"
        folder.write_status("interrupted", resume=again, **steps)
        display.say(f"interrupted after step {outcome.step}; resume with: {again}")
        return outcome.exit_code
    folder.write_status("finished", **steps)
    if outcome.before is not None:
        display.say(f"held-out accuracy before: {outcome.before}")
    if outcome.after is not None:
        display.say(f"held-out accuracy after:  {outcome.after}")
    display.say(f"run folder: {_shown(folder.path)}")
    display.say(f"checkpoint: {_shown(checkpoint) if checkpoint else 'none'}")
    if best is not None:
        display.say(f"best checkpoint: {best}")
    return 0


def _shown(path: Path) -> str:
    """Relative where that is shorter to read."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
