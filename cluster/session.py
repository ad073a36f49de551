"""One run from Ray's start to its end: materials, folder, actors, loop, and what is said last."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from actors.sampling import Flight, OnDemand, Sampled, sample_and_verify
from actors.stream import SampleStream, StreamOptions
from cluster.checkpoints import Checkpoints, LoopState, load_state
from cluster.curation import make_sampler
from cluster.engine_fit import check_kv_cache
from cluster.interrupts import Interrupts
from cluster.jobs import current_job, stop_notice
from cluster.loop import Outcome, Run, best_facts, sample_request, train_loop, train_step
from cluster.materials import Materials, Say, prepare
from cluster.mirror import mirrored
from cluster.model_on_nodes import provide_model
from cluster.nodes import nodes_for_actors
from cluster.optimal_values import RewardFile, beside_dataset, optimal_values
from cluster.placement import Placement, place
from cluster.preflight import check_disk, check_nodes
from cluster.progress import Display
from cluster.ray_session import ray_session
from cluster.reference import ReferenceResets, References
from cluster.run_folder import RunFolder
from cluster.run_place import RunPlace, leave, new_place, resumed_place
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
    """Where a resumed run goes on: its place, its newest checkpoint, and the loop's state in it."""

    place: RunPlace
    checkpoint: Path
    state: LoopState


def find_resumed(run: str, config: Config, say: Say) -> Resumed:
    """The newest whole checkpoint of a run in a folder or at a URL, verified. UsageError if there is none."""
    place = resumed_place(run, config, say)
    run_folder = RunFolder(place.folder)
    newest = Checkpoints(run_folder.checkpoints, keep=1).newest()
    if newest is None:
        raise UsageError(
            f"--resume {run}: there is no whole checkpoint in {run_folder.checkpoints}. "
            f"Start a new run with --config {place.folder / 'config.yaml'}."
        )
    state = load_state(newest)
    if state.step >= config.training.steps:
        raise UsageError(
            f"--resume {run}: its {state.step} steps are done. To go on, raise training.steps "
            f"(training.steps={2 * state.step}, say)."
        )
    return Resumed(place, newest, state)


def run_session(config: Config, recipe: str, resumed: Resumed | None, display: Display) -> int:
    """Train, new or resumed; returns 0, or 130 / 143 when told to stop."""
    where = resumed.place if resumed else new_place(config, recipe)
    display.say(f"run folder: {where}")
    if job := current_job():
        display.say(stop_notice(job))
    with ray_session(config.cluster.dashboard_port) as dashboard:
        display.say(dashboard)
        nodes = nodes_for_actors()
        placement = place(config, nodes)
        display.say(str(placement))
        check_nodes(config, nodes, where, display.say)
        materials = prepare(config, display.say)
        check_kv_cache(config, materials.model_path, placement.on_gpus)
        check_disk(config, materials.model_path, where)
        given = provide_model(config.model, materials.model_path, nodes, config.cluster.deadline_seconds)
        if given:
            display.say(f"the model was brought to {', '.join(given)}")
        folder = _open_folder(config, where, resumed)
        folder.write_status("starting")
        with mirrored(folder, where.url, display.say, config.cluster.deadline_seconds):
            try:
                outcome = _train(config, materials, folder, resumed, display, placement)
            except KeyboardInterrupt:  # told to stop before the loop, which takes signals itself
                folder.write_status("interrupted", resume=_resume_command(config, folder, where))
                raise
            except BaseException as error:  # whatever ends the run is written down, then goes on
                folder.write_status("failed", error=f"{type(error).__name__}: {error}")
                raise
            _record(config, folder, where, outcome)
    return _conclude(config, folder, where, outcome, display)


def _open_folder(config: Config, place: RunPlace, resumed: Resumed | None) -> RunFolder:
    if resumed is None:
        return RunFolder.create(place.folder, dump_config(config))
    folder = RunFolder(place.folder)
    folder.rewind(resumed.state.step)
    return folder


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
            checkpoints=Checkpoints(folder.checkpoints, config.checkpoint.keep, folder.changed),
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


def _record(config: Config, folder: RunFolder, place: RunPlace, outcome: Outcome) -> None:
    """How the run ended, in status.json."""
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    steps = {"step": outcome.step, "steps": config.training.steps, **best_facts(checkpoints)}
    if outcome.exit_code is None:
        folder.write_status("finished", **steps)
    else:
        folder.write_status("interrupted", resume=_resume_command(config, folder, place), **steps)


def _resume_command(config: Config, folder: RunFolder, place: RunPlace) -> str:
    if Checkpoints(folder.checkpoints, config.checkpoint.keep).newest() is None:
        return "nothing to resume yet"
    start = (
        "python run_local.py" if current_job() is None else "ray job submit --working-dir . -- python -m cluster.train"
    )
    return f"{start} --resume {place.url or _shown(place.folder)}"


def _conclude(config: Config, folder: RunFolder, place: RunPlace, outcome: Outcome, display: Display) -> int:
    """What is said last; the exit code."""
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    checkpoint, best = checkpoints.newest(), checkpoints.best()
    if outcome.exit_code is not None:
        display.say(f"interrupted after step {outcome.step}; resume with: {_resume_command(config, folder, place)}")
        leave(place)
        return outcome.exit_code
    if outcome.before is not None:
        display.say(f"held-out accuracy before: {outcome.before}")
    if outcome.after is not None:
        display.say(f"held-out accuracy after:  {outcome.after}")
    shown = place.url or _shown(place.folder)
    display.say(f"run folder: {shown}")
    display.say(f"checkpoint: {f'{shown}/checkpoints/{checkpoint.name}' if checkpoint else 'none'}")
    if best is not None:
        display.say(f"best checkpoint: {best}")
    leave(place)
    return 0


def _shown(path: Path) -> str:
    """Relative where that is shorter to read."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
