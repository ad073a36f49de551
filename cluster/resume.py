"""Where a resumed run goes on: at its newest whole checkpoint; and what is no longer exact if that is cut otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoints import Checkpoints, LoopState, Say
from cluster.run_folder import RunFolder
from cluster.run_place import RunPlace, resumed_place
from configs.errors import UsageError
from configs.schema import Config


@dataclass(frozen=True)
class Resumed:
    """Where a resumed run goes on: its place, its newest checkpoint, and the loop's state in it."""

    place: RunPlace
    checkpoint: Path
    state: LoopState


def find_resumed(run: str, config: Config, say: Say) -> Resumed:
    """The newest whole checkpoint of a run in a folder or at a URL, verified. UsageError if there is none."""
    place = resumed_place(run, config, say)
    folder = RunFolder(place.folder).checkpoints
    newest = Checkpoints(folder, keep=1).newest_verified(say)
    if newest is None:
        raise UsageError(
            f"--resume {run}: there is no whole checkpoint in {folder}. "
            f"Start a new run with --config {place.folder / 'config.yaml'}."
        )
    checkpoint, state = newest
    if state.step >= config.training.steps:
        raise UsageError(
            f"--resume {run}: its {state.step} steps are done. To go on, raise training.steps "
            f"(training.steps={2 * state.step}, say)."
        )
    if text := cut_otherwise(config, state):
        say(text)
    return Resumed(place, checkpoint, state)


def cut_otherwise(config: Config, state: LoopState) -> str | None:
    """What another number of learner ranks or another ZeRO stage than the checkpoint's changes; None for the same."""
    ranks, stage = config.cluster.learner_ranks, config.learner.zero_stage
    if (ranks, stage) == (state.learner_ranks, state.zero_stage):
        return None
    anew = ", but 8-bit moments, which are quantised anew" if config.learner.eight_bit else ""
    return (
        f"resharding from learner_ranks={state.learner_ranks}, zero_stage={state.zero_stage} to learner_ranks={ranks}, "
        f"zero_stage={stage}: weights and optimizer states stay exactly what they were{anew}; from now on gradients "
        "are summed in another order, so what follows is the undisturbed run to rounding, no longer bit for bit"
    )
