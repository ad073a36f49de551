"""The cache of models made here (warm-started, converted): checked before every use, never trusted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

MANIFEST = "pocketgrpo_manifest.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
LOCK_SECONDS = 900.0


class ModelError(ValueError):
    """A model that cannot be found, read or made. One paragraph: the cause, then the fix."""


def cached_folder(
    cache_dir: str | Path,
    name: str,
    key: Mapping[str, object],
    build: Callable[[Path], None],
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """The folder that `build(folder)` fills, built once per `key` (JSON values) and library versions.

    A folder found is used only if its manifest names this key and every file has its size and
    sha256; otherwise it is built again and `on_note` gets the reason. Building happens in a
    temporary folder beside it, renamed at the end; a second process waits for the first.
    """
    full_key = {**key, "libraries": {library: version(library) for library in LIBRARIES}}
    digest = hashlib.sha256(json.dumps(full_key, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(cache_dir).expanduser()
    folder, draft = root / f"{name}-{digest}", root / f".building-{name}-{digest}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".lock-{name}-{digest}"):
            if folder.exists():
                fault = find_fault(folder, digest)
                if fault is None:
                    return folder
                if on_note is not None:
                    on_note(f"The cached model {folder} is not as it was written ({fault}); building it again.")
            _build(folder, draft, digest, build)
    except OSError as error:
        raise ModelError(
            f"The model cache in {root} cannot be written: {error}. Free some space there, or set "
            "model.cache_dir to a folder that can be written."
        ) from error
    return folder


def find_fault(folder: Path, digest: str) -> str | None:
    """What is wrong with a cached folder, or None if every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if manifest["key"] != digest:
            return f"its manifest is for the key {manifest['key']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error!r}"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    if found != set(expected):
        return f"files missing or strange: {', '.join(sorted(found ^ set(expected)))}"
    for name, (size, sha256) in expected.items():
        path = folder / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if file_sha256(path) != sha256:
            return f"{name} has another sha256 than when it was written"
    return None


def _build(folder: Path, draft: Path, digest: str, build: Callable[[Path], None]) -> None:
    """Fills the draft, writes its manifest last, and renames it over what stands at `folder`."""
    shutil.rmtree(draft, ignore_errors=True)  # left by a build that was killed: we hold the lock
    draft.mkdir()
    try:
        build(draft)
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        entries = {
            str(path.relative_to(draft)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
        }
        (draft / MANIFEST).write_text(json.dumps({"key": digest, "files": entries}, indent=1))
        for path in (*files, draft / MANIFEST):
            _sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers while a model is loaded or saved."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the file's lock; the kernel lets it go when the process dies."""
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ModelError(
                        f"Another process has held {path} for {LOCK_SECONDS:.0f} s while it builds the same "
                        "model. Wait for it to end or end it, then start again."
                    ) from None
                time.sleep(0.2)
        yield


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
