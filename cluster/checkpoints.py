"""Checkpoints of a run: begun in memory, finished by a manifest, found again by it.

A folder counts as a checkpoint once `manifest.json` stands in it; the manifest lists every file with
size and SHA-256 and is renamed into place last, so a half-written one is never taken for whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.learner_group import LearnerGroup
from configs.errors import RunError, UsageError

MANIFEST = "manifest.json"
BUFFER = "buffer.parquet"


@dataclass(frozen=True)
class LoopState:
    """What the loop itself must keep: steps done, the sampler's cursor, the policy version, ranks and stage.

    trained, stale, flat: what became of the prompts before the cursor (see `Account`). pushed: sampling ahead, the
    policy versions that a group may still have begun with; the groups that waited are in the file `BUFFER`.
    reference: name of the reference policy's folder (None: the initial model); rewards_since_reset: what
    `ReferenceResets` has seen since. accuracy, accuracy_strict: on the held-out problems, None where the
    policy of this step was not evaluated.
    """

    step: int
    cursor: int
    version: int
    learner_ranks: int
    zero_stage: int
    reference: str | None = None
    rewards_since_reset: tuple[float, ...] = ()
    accuracy: float | None = None
    accuracy_strict: float | None = None
    trained: int = 0
    stale: int = 0
    flat: int = 0
    pushed: tuple[int, ...] = ()


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the highest held-out accuracy: strict first, then lenient, then the earlier step."""

    path: Path
    step: int
    accuracy_strict: float
    accuracy: float

    def __str__(self) -> str:
        return f"{self.path.name}, held-out accuracy {self.accuracy_strict:.1%} strict, {self.accuracy:.1%} lenient"

    def facts(self) -> dict[str, Any]:
        """What status.json says of it."""
        return {
            "checkpoint": self.path.name,
            "step": self.step,
            "accuracy_strict": self.accuracy_strict,
            "accuracy": self.accuracy,
        }


class Checkpoints:
    """The checkpoints of one run folder; keeps the newest `keep`, and the best. `sealed()` hears of each new one."""

    def __init__(self, folder: Path, keep: int, sealed: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._keep = keep
        self._sealed = sealed
        self._under_way: tuple[Path, LoopState] | None = None

    def begin(
        self, learner: LearnerGroup, state: LoopState, write_more: Callable[[Path], None] = lambda folder: None
    ) -> None:
        """Copy the state; the ranks write it in the background. A save still under way is finished first.

        write_more: puts small files of the loop's own into the folder.
        """
        self.poll(learner, wait=True)
        folder = self.folder / f"step_{state.step:06d}"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_more(folder)
        learner.begin_save(folder)
        self._under_way = (folder, state)

    def poll(self, learner: LearnerGroup, wait: bool = False) -> Path | None:
        """Seal the save under way once all ranks have written; returns it when that happened now."""
        if self._under_way is None:
            return None
        folder, state = self._under_way
        try:
            if not learner.saved(wait):
                return None
            seal(folder, state)
        except OSError as error:
            self._under_way = None
            shutil.rmtree(folder, ignore_errors=True)
            raise RunError(
                f"The checkpoint {folder} could not be written: {error}. Free disk space or choose another "
                f"training.runs_dir; the newest good checkpoint is {self.newest() or 'none yet'}."
            ) from error
        self._under_way = None
        self.prune()
        self._sealed()
        return folder

    def prune(self) -> None:
        """Delete all but the newest and the best."""
        best = self.best()
        for old in self.all()[: -self._keep]:
            if best is None or old != best.path:
                (old / MANIFEST).unlink()
                shutil.rmtree(old)

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step_*/{MANIFEST}"))

    def newest(self) -> Path | None:
        whole = self.all()
        return whole[-1] if whole else None

    def best(self) -> BestCheckpoint | None:
        """The best by the held-out problems, never by a benchmark; None as long as no checkpoint was evaluated."""
        states = [(path, state_of(path)) for path in self.all()]
        evaluated = [
            BestCheckpoint(path, state.step, state.accuracy_strict, state.accuracy)
            for path, state in states
            if state.accuracy is not None and state.accuracy_strict is not None
        ]
        return max(evaluated, key=lambda each: (each.accuracy_strict, each.accuracy, -each.step), default=None)


def load_state(checkpoint: Path) -> LoopState:
    """The loop's state in a checkpoint, after every file has been checked against the manifest.

    UsageError naming the file that is missing or differs.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file() or _describe(path) != expected:
            raise UsageError(
                f"The checkpoint {checkpoint} is damaged: {name} is missing or differs from the manifest. "
                "Delete this checkpoint's folder and resume from the one before."
            )
    return state_of(checkpoint)


def state_of(checkpoint: Path) -> LoopState:
    """The loop's state in a checkpoint, as its manifest has it; no file is checked."""
    state = json.loads((checkpoint / MANIFEST).read_text())["state"]
    lists = {name: tuple(value) for name, value in state.items() if isinstance(value, list)}
    return LoopState(**{**state, **lists})


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint's folder is named after."""
    match = re.fullmatch(r"step_(\d+)", checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named step_NNNNNN")
    return int(match[1])


def seal(folder: Path, state: LoopState) -> None:
    """Make the folder a checkpoint: the manifest of all its files, renamed into place."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {"state": asdict(state), "files": {str(p.relative_to(folder)): _describe(p) for p in files}}
    draft = folder / f"{MANIFEST}.draft"
    with draft.open("w") as out:
        json.dump(manifest, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    draft.rename(folder / MANIFEST)


def _describe(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
