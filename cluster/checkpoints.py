"""Checkpoints of a run: begun by copies in memory, finished by a manifest, found again by it.

A folder counts as a checkpoint once `manifest.json` stands in it; the manifest lists every file with
size and SHA-256 and is renamed into place last, so a half-written one is never taken for whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError

from cluster.learner_group import LearnerGroup
from configs.errors import RunError, UsageError
from learner.checkpoint_writer import BackgroundWriter, FileFacts, described

MANIFEST = "manifest.json"
DAMAGED_MANIFEST = "manifest.damaged.json"  # what a damaged checkpoint's is renamed to, once it was passed over
BUFFER = "buffer.parquet"
SEAL_SECONDS = 300.0  # to write the manifest and to delete an old checkpoint

Say = Callable[[str], None]


class DamagedCheckpoint(UsageError):
    """A checkpoint that is not as it was written. problem: which file of it, and how it differs."""

    def __init__(self, checkpoint: Path, problem: str) -> None:
        super().__init__(
            f"The checkpoint {checkpoint} is damaged: {problem}. Delete its folder and use the checkpoint before it."
        )
        self.problem = problem


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
    """The checkpoints of one run folder; keeps the newest `keep`, and the best. `sealed()` hears of each new one.

    A save does not stop the loop: the ranks copy, write and hash in the background, where whatever changes their state
    waits for the copies, and so does the driver write the manifest and delete what is old.
    """

    def __init__(self, folder: Path, keep: int, sealed: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._keep = keep
        self._sealed = sealed
        self._under_way: tuple[Path, LoopState] | None = None
        self._sealing = False
        self._background: BackgroundWriter[None] = BackgroundWriter()

    def begin(
        self, learner: LearnerGroup, state: LoopState, write_more: Callable[[Path], None] = lambda folder: None
    ) -> None:
        """Have the ranks save their state in the background. A save still under way is finished first.

        write_more: puts small files of the loop's own into the folder.
        """
        self.poll(learner, wait=True)
        folder = self.folder / f"step_{state.step:06d}"
        try:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            write_more(folder)
        except OSError as error:
            raise self._not_written(folder, error) from error
        learner.begin_save(folder)
        self._under_way = (folder, state)

    def poll(self, learner: LearnerGroup, wait: bool = False) -> Path | None:
        """See how far the save under way is, and with `wait` finish it; its folder, once it is a checkpoint."""
        if self._under_way is None:
            return None
        folder, state = self._under_way
        try:
            if not self._sealing:
                written = learner.saved(wait)
                if written is None:
                    return None
                self._background.start(lambda: self._finish(folder, state, written))
                self._sealing = True
            if not self._background.done(wait, SEAL_SECONDS):
                return None
        except OSError as error:
            self._under_way, self._sealing = None, False
            raise self._not_written(folder, error) from error
        self._under_way, self._sealing = None, False
        self._sealed()
        return folder

    def settle(self) -> None:
        """Wait for what is being sealed or deleted: what is found after this stays as it is."""
        with suppress(OSError):  # of a save that nobody waits for any more
            self._background.done(wait=True, seconds=SEAL_SECONDS)

    def _finish(self, folder: Path, state: LoopState, written: Mapping[str, FileFacts]) -> None:
        seal(folder, state, written)
        self.prune()

    def _not_written(self, folder: Path, error: OSError) -> RunError:
        """What to say of it; what there is of the folder is deleted, unless it became a checkpoint all the same."""
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)
        cause = error.cause if isinstance(error, RayTaskError) else error  # over there, without its traceback
        remedy = (
            "Free memory: a checkpoint is copied there before it is written (--plan says how much of it that takes)"
            if cause.errno == errno.ENOMEM
            else "Free disk space or choose another training.runs_dir"
        )
        return RunError(
            f"The checkpoint {folder} could not be written: {cause}. {remedy}; the newest good checkpoint is "
            f"{self.newest() or 'none yet'}."
        )

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

    def states(self) -> list[tuple[Path, LoopState]]:
        """Those of them whose manifest can be read, and the loop's state in it."""
        found = []
        for path in self.all():
            try:
                found.append((path, state_of(path)))
            except DamagedCheckpoint:  # or deleted just now, in the background
                continue
        return found

    def newest(self) -> Path | None:
        whole = self.all()
        return whole[-1] if whole else None

    def newest_verified(self, say: Say) -> tuple[Path, LoopState] | None:
        """The newest that is as it was written, by every file's checksum; None if there is none.

        Damaged ones are passed over, said, and never counted again; their folders stay.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.all()):
            try:
                state = load_state(path)
            except DamagedCheckpoint as error:
                damaged.append((path, error.problem))
                continue
            for other, problem in damaged:
                say(f"warning: the checkpoint {other.name} is damaged ({problem}); {path.name} is used instead")
                (other / MANIFEST).rename(other / DAMAGED_MANIFEST)
            return path, state
        for path, problem in damaged:
            say(f"warning: the checkpoint {path.name} is damaged ({problem})")
        return None

    def best(self) -> BestCheckpoint | None:
        """The best by the held-out problems, never by a benchmark; None as long as no checkpoint was evaluated."""
        evaluated = [
            BestCheckpoint(path, state.step, state.accuracy_strict, state.accuracy)
            for path, state in self.states()
            if state.accuracy is not None and state.accuracy_strict is not None
        ]
        return max(evaluated, key=lambda each: (each.accuracy_strict, each.accuracy, -each.step), default=None)


def load_state(checkpoint: Path) -> LoopState:
    """The loop's state in a checkpoint, after every file has been checked against the manifest.

    DamagedCheckpoint naming the file that is missing or differs.
    """
    state, files = _read_manifest(checkpoint)
    for name, expected in files.items():
        try:
            found = described(checkpoint / name)
        except OSError as error:
            raise DamagedCheckpoint(checkpoint, f"{name} cannot be read: {error.strerror}") from error
        if found["bytes"] != expected["bytes"]:
            raise DamagedCheckpoint(checkpoint, f"{name} has {found['bytes']} bytes and had {expected['bytes']}")
        if found != expected:
            raise DamagedCheckpoint(checkpoint, f"{name} is not what was written, by its SHA-256")
    return state


def state_of(checkpoint: Path) -> LoopState:
    """The loop's state in a checkpoint, as its manifest has it; no other file is looked at."""
    return _read_manifest(checkpoint)[0]


def _read_manifest(checkpoint: Path) -> tuple[LoopState, dict[str, FileFacts]]:
    """What an older manifest lacks is as at the start."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in manifest["state"].items()}
        return LoopState(**values), dict(manifest["files"])
    except OSError as error:
        raise DamagedCheckpoint(checkpoint, f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, or not that of a manifest
        raise DamagedCheckpoint(checkpoint, f"{MANIFEST} is no manifest: {error}") from error


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint's folder is named after."""
    match = re.fullmatch(r"step_(\d+)", checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named step_NNNNNN")
    return int(match[1])


def seal(folder: Path, state: LoopState, written: Mapping[str, FileFacts] | None = None) -> None:
    """Make the folder a checkpoint: the manifest of all its files, renamed into place.

    written: what those who wrote have described already; the other files are hashed here. OSError if one of
    them is not to be seen from here.
    """
    written = written or {}
    for name, facts in written.items():
        if (folder / name).stat().st_size != facts["bytes"]:
            raise OSError(f"{folder / name} is not what a learner rank wrote; is it on a disk that all nodes share?")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: written.get(name) or described(folder / name) for name in names}
    manifest = {"state": asdict(state), "files": files}
    draft = folder / f"{MANIFEST}.draft"
    with draft.open("w") as out:
        json.dump(manifest, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    draft.rename(folder / MANIFEST)
