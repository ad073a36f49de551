"""Writes one rank's part of a checkpoint in the background, from copies made in memory."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

Answer = TypeVar("Answer")


class FileFacts(TypedDict):
    """What the manifest has of a file."""

    bytes: int
    sha256: str


class BackgroundWriter(Generic[Answer]):
    """One write at a time, in a thread; whoever asks `done` hears of its failure. `answer`: the last one's."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.answer: Answer | None = None

    def start(self, write: Callable[[], Answer]) -> None:
        """Run `write` in the background, after the one before it has ended."""
        self.done(wait=True)
        self.answer = None
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def done(self, wait: bool, seconds: float | None = None) -> bool:
        """Whether nothing is being written any more; with `wait`, once that is so, or TimeoutError after `seconds`."""
        if self._thread is not None and wait:
            self._thread.join(seconds)
            if self._thread.is_alive():
                raise TimeoutError(errno.ETIMEDOUT, f"the disk has not answered for {seconds:g} s")
        running = self._thread is not None and self._thread.is_alive()  # asked first: it may fail just now
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return not running

    def _run(self, write: Callable[[], Answer]) -> None:
        try:
            self.answer = write()
        except BaseException as error:  # noqa: BLE001 - kept for `done`, in the thread that can act on it
            self._failure = error


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file that others may read, which safetensors itself makes readable to its owner alone.

    OSError if the disk does not take it.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)


def write_model(folder: Path, weights: dict[str, torch.Tensor], configs: list[Any], tokenizer: Any) -> None:
    """A Hugging Face model folder, as transformers and vLLM open it.

    configs: the model's config and generation config. `use_cache` is saved as true: without it a
    checkpoint generates many times slower.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(weights, folder / "model.safetensors")
    for config in configs:
        config.use_cache = True
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def flush_to_disk(folder: Path) -> None:
    """fsync every file under the folder, and the folders themselves.

    Ranks write into the same folder: a file that is gone again was another rank's draft, which
    safetensors has renamed since, and that rank flushes what it wrote.
    """
    for path in [*folder.rglob("*"), folder]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def described(path: Path) -> FileFacts:
    """A file's size and SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
