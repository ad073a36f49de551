"""One run from Ray's start to its end: materials, folder, actors, loop, and what is said last."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from actors.restarts import Restarts
from cluster.account import Account
from cluster.attempt import BEFORE_THE_START, Start, attempt
from cluster.checkpoints import Checkpoints, LoopState
from cluster.engine_fit import check_kv_cache
from cluster.interrupts import exit_code
from cluster.jobs import current_job, stop_notice
from cluster.learner_group import LearnerLost
from cluster.loop import Outcome, best_facts
from cluster.materials import Materials, prepare
from cluster.mirror import mirrored
from cluster.model_on_nodes import provide_model
from cluster.nodes import nodes_for_actors
from cluster.placement import Placement, place
from cluster.preflight import check_disk, check_nodes, check_shared_memory, machines_of
from cluster.progress import Display
from cluster.ray_session import ray_session
from cluster.resume import Resumed
from cluster.run_folder import RunFolder
from cluster.run_place import RunPlace, leave, new_place
from configs.errors import RunError
from configs.loading import dump_config
from configs.schema import Config


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
        machines = machines_of(nodes)
        check_nodes(config, nodes, machines, where, display.say)
        materials = prepare(config, display.say)
        check_kv_cache(config, materials.model_path, placement.on_gpus)
        check_disk(config, materials.model_path, where)
        if not placement.on_gpus:
            check_shared_memory(config, materials.model_path, [machine for machine, _ in machines])
        given = provide_model(config.model, materials.model_path, nodes, config.cluster.deadline_seconds)
        if given:
            display.say(f"the model was brought to {', '.join(given)}")
        folder = _open_folder(config, where, resumed)
        folder.write_status("starting")
        with mirrored(folder, where.url, display.say, config.cluster.deadline_seconds):
            try:
                outcome = _train(config, materials, folder, resumed, display, placement)
            except KeyboardInterrupt:  # where no loop takes it: at the start, or when the learner is lost
                folder.write_status("interrupted", resume=_resume_command(config, folder, where))
                display.say(f"interrupted; {_how_to_go_on(config, folder, where)}")
                return exit_code()
            except BaseException as error:  # whatever ends the run is written down, then goes on
                with suppress(RunError):  # of the same full disk
                    folder.write_failure(error, _resume_command(config, folder, where))
                display.say(f"the run failed; {_how_to_go_on(config, folder, where)}")
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
    """Train to the end. When a learner rank is lost, everything goes back to the newest checkpoint, or the start."""
    first = LoopState(0, 0, 0, config.cluster.learner_ranks, config.learner.zero_stage)
    start = Start(resumed.checkpoint, resumed.state) if resumed else Start(None, first)
    account = Account(start.state.trained, start.state.stale, start.state.flat)
    restarts = Restarts(display.say)
    while True:
        try:
            return attempt(config, materials, folder, start, display, placement, account, restarts)
        except LearnerLost as error:
            restarts.allow("The learner", str(error))
        newest = Checkpoints(folder.checkpoints, config.checkpoint.keep).newest_verified(display.say)
        start = Start(*newest, again=True) if newest else Start(None, first, again=True)
        account.rewind(start.state)
        folder.rewind(start.state.step if start.checkpoint else BEFORE_THE_START)
        display.say(f"everything goes back to {start.checkpoint.name if start.checkpoint else 'the start'}")
        placement = place(config, nodes_for_actors())


def _record(config: Config, folder: RunFolder, place: RunPlace, outcome: Outcome) -> None:
    """How the run ended, in status.json."""
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    steps = {"step": outcome.step, "steps": config.training.steps, **best_facts(checkpoints), **outcome.facts}
    if outcome.exit_code is None:
        folder.write_status("finished", **steps)
    else:
        folder.write_status("interrupted", resume=_resume_command(config, folder, place), **steps)


def _resume_command(config: Config, folder: RunFolder, place: RunPlace) -> str | None:
    """None if there is no checkpoint yet."""
    if Checkpoints(folder.checkpoints, config.checkpoint.keep).newest() is None:
        return None
    start = (
        "python run_local.py" if current_job() is None else "ray job submit --working-dir . -- python -m cluster.train"
    )
    return f"{start} --resume {place.url or _shown(place.folder)}"


def _how_to_go_on(config: Config, folder: RunFolder, place: RunPlace) -> str:
    resume = _resume_command(config, folder, place)
    return f"resume with: {resume}" if resume else "there is no checkpoint to resume from"


def _conclude(config: Config, folder: RunFolder, place: RunPlace, outcome: Outcome, display: Display) -> int:
    """What is said last; the exit code."""
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    checkpoint, best = checkpoints.newest(), checkpoints.best()
    if outcome.exit_code is not None:
        display.say(f"interrupted after step {outcome.step}; {_how_to_go_on(config, folder, place)}")
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
