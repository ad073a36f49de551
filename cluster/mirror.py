"""A run at a URL: the run works in a local folder, which is copied to the URL in the background."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.checkpoints import MANIFEST
from cluster.run_folder import RunFolder
from configs.errors import RunError, UsageError
from configs.urls import open_filesystem
from configs.within import within

Say = Callable[[str], None]

PAUSES = (1.0, 4.0, 16.0)  # seconds between the attempts of one copy
LAST = "status.json"  # tells of what must be there already
PRUNED = ("checkpoints", "references")  # folders whose content comes and goes


class Mirror:
    """Keeps a copy of a run folder at a URL: whole checkpoints, each ended by its manifest, and all small files.

    `request` has the folder copied in the background. A copy that fails is tried again and said, and the
    run goes on; `close` copies what is missing and raises RunError if it cannot.
    """

    def __init__(self, folder: Path, url: str, say: Say, seconds: float, pauses: tuple[float, ...] = PAUSES) -> None:
        self.folder, self.url = folder, url
        self._say, self._seconds, self._pauses = say, seconds, pauses
        self._filesystem, self._root = open_filesystem(url)
        self._sent: dict[str, tuple[int, int]] = {}
        self._wanted, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def open(self) -> None:
        """Copy what there is, the first time: UsageError if the URL cannot be written."""
        try:
            within(self._seconds, self._copy, f"Writing to {self.url}")
        except Exception as error:  # each filesystem of fsspec has errors of its own
            raise UsageError(
                f"{self.url} cannot be written: {_reason(error)}. Check training.runs_dir and the credentials."
            ) from error
        self._thread.start()

    def request(self) -> None:
        """Have the folder copied soon; returns at once."""
        self._wanted.set()

    def close(self) -> None:
        """Copy all that is not there yet. RunError, naming the local folder, if that fails or takes too long."""
        self._closing = True
        self.request()
        self._thread.join(self._seconds)
        try:
            error = within(self._seconds, self._attempts, f"Copying to {self.url}")
        except TimeoutError as late:
            error = late
        if error is not None:
            raise RunError(
                f"The run is whole in {self.folder} on this machine, and its copy at {self.url} is not: "
                f"{_reason(error)}. Copy the folder there by hand, or go on with --resume {self.folder}."
            )

    def _run(self) -> None:
        while not self._closing:
            self._wanted.wait()
            self._wanted.clear()
            if not self._closing and (error := self._attempts()):
                self._say(
                    f"warning: the copy at {self.url} is behind: {_reason(error)}; the run goes on in {self.folder} "
                    "and is copied again after the next checkpoint"
                )

    def _attempts(self) -> Exception | None:
        """Copy, again after each pause if it failed; the last error, or None."""
        for pause in (*self._pauses, None):
            try:
                self._copy()
            except Exception as error:  # noqa: BLE001 - each filesystem of fsspec has errors of its own
                if pause is None:
                    return error
                self._say(f"copying to {self.url} failed, again in {pause:g} s: {_reason(error)}")
                time.sleep(pause)
            else:
                break
        return None

    def _copy(self) -> None:
        checkpoints = whole_checkpoints(self.folder)
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if name.parts[0] != "checkpoints" and name.name != LAST and path.suffix != ".draft" and path.is_file():
                self._send(path)
        for checkpoint in checkpoints:
            self._send_checkpoint(checkpoint)
        self._delete_what_is_gone(checkpoints)
        if (self.folder / LAST).exists():
            self._send(self.folder / LAST)

    def _send(self, path: Path) -> None:
        """Copy one file, unless it is as it was when it was copied last."""
        name, facts = str(path.relative_to(self.folder)), path.stat()
        stamp = (facts.st_size, facts.st_mtime_ns)
        if self._sent.get(name) == stamp:
            return
        target = f"{self._root}/{name}"
        self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._filesystem.put_file(str(path), target)
        self._sent[name] = stamp

    def _send_checkpoint(self, checkpoint: Path) -> None:
        """The manifest goes last and says that the others are there; it holds their hashes."""
        name = str(checkpoint.relative_to(self.folder))
        target = f"{self._root}/{name}/{MANIFEST}"
        try:
            manifest, facts = (checkpoint / MANIFEST).read_bytes(), (checkpoint / MANIFEST).stat()
            stamp = (facts.st_size, facts.st_mtime_ns)
            if self._sent.get(name) == stamp:
                return
            there = _read(self._filesystem, target)
            if there == manifest:
                self._sent[name] = stamp
                return
            if there is not None:  # of an earlier attempt at this step
                self._filesystem.rm(target)
            for path in sorted(checkpoint.rglob("*")):
                if path.is_file() and path.name != MANIFEST:
                    self._send(path)
            after = (checkpoint / MANIFEST).stat()
        except FileNotFoundError:
            if (checkpoint / MANIFEST).exists():
                raise
            return  # pruned meanwhile
        if (after.st_mtime_ns, after.st_ino) != (facts.st_mtime_ns, facts.st_ino):
            return  # written anew meanwhile: what was sent may be a mixture, and the next copy is asked for already
        self._filesystem.pipe_file(target, manifest)
        self._sent[name] = stamp

    def _delete_what_is_gone(self, checkpoints: list[Path]) -> None:
        kept = {path.name for path in checkpoints}
        kept |= {path.name for path in (self.folder / "references").glob("*")}
        self._filesystem.invalidate_cache()
        for parent in PRUNED:
            if not self._filesystem.isdir(f"{self._root}/{parent}"):
                continue
            for path in self._filesystem.ls(f"{self._root}/{parent}", detail=False):
                name = path.rstrip("/").rpartition("/")[2]
                if name not in kept:
                    self._filesystem.rm(path, recursive=True)
                    gone = f"{parent}/{name}"
                    self._sent = {sent: stamp for sent, stamp in self._sent.items() if not sent.startswith(gone)}


@contextmanager
def mirrored(folder: RunFolder, url: str | None, say: Say, seconds: float) -> Iterator[None]:
    """While entered, the run folder is copied to the URL, if any, as it changes; at the end it is whole there."""
    if url is None:
        yield
        return
    mirror = Mirror(folder.path, url, say, seconds)
    mirror.open()
    folder.changed = mirror.request
    try:
        yield
    except BaseException:  # whatever ended the run, what there is of it is copied
        try:
            mirror.close()
        except RunError as error:  # what ended the run comes first
            say(f"warning: {error}")
        raise
    mirror.close()


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a local run folder that have their manifest, oldest first."""
    return sorted(path.parent for path in folder.glob(f"checkpoints/step_*/{MANIFEST}"))


def fetch_run(url: str, folder: Path, seconds: float) -> None:
    """Copy small files and whole checkpoints of the run at a URL into `folder`, a new one. RunError if it cannot."""
    draft = folder.with_name(f"{folder.name}.fetching")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        within(seconds, lambda: _fetch(url, draft), f"Fetching {url}")
    except Exception as error:  # each filesystem of fsspec has errors of its own
        raise RunError(f"The run at {url} cannot be fetched: {_reason(error)}. Try again, or check the URL.") from error
    draft.rename(folder)


def newest_at(url: str) -> str:
    """The name of the newest whole checkpoint at a URL; empty if there is none."""
    filesystem, root = open_filesystem(url)
    filesystem.invalidate_cache()
    return max((_checkpoint_of(name) for name in _names(filesystem, root) if name.endswith(f"/{MANIFEST}")), default="")


def holds_run(url: str) -> bool:
    """Whether there is a run at this URL."""
    filesystem, root = open_filesystem(url)
    return bool(filesystem.exists(f"{root}/config.yaml"))


def _fetch(url: str, folder: Path) -> None:
    filesystem, root = open_filesystem(url)
    filesystem.invalidate_cache()
    names = _names(filesystem, root)
    whole = {_checkpoint_of(name) for name in names if name.endswith(f"/{MANIFEST}")}
    for name in names:
        if not name.startswith("checkpoints/") or _checkpoint_of(name) in whole:
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"it holds a file named {name!r}, which would be written outside of the run's folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{root}/{name}", str(target))


def _names(filesystem: Any, root: str) -> list[str]:
    """Every file under the root, by its path from there."""
    return [path.removeprefix(root.rstrip("/") + "/") for path in filesystem.find(root)]


def _checkpoint_of(name: str) -> str:
    return name.split("/")[1]


def _read(filesystem: Any, path: str) -> bytes | None:
    try:
        return bytes(filesystem.cat_file(path))
    except FileNotFoundError:
        return None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
