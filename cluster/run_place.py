"""Where a run is: the folder it works in, and the URL that the folder is copied to, if any."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from cluster.mirror import fetch_run, holds_run, newest_at, whole_checkpoints
from configs.errors import RunError, UsageError
from configs.schema import Config
from configs.urls import is_url
from configs.within import within

Say = Callable[[str], None]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RunPlace:
    """folder: absolute; url: of the same run, None where training.runs_dir is a path."""

    folder: Path
    url: str | None = None

    def __str__(self) -> str:
        return self.url or str(self.folder)


def new_place(config: Config, recipe: str) -> RunPlace:
    """The place of a new run; nothing is made yet. UsageError if its URL holds a run already."""
    name = config.training.name
    name = name if name != "auto" else f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not is_url(config.training.runs_dir):
        return RunPlace(Path(config.training.runs_dir).expanduser().resolve() / name)
    url = f"{config.training.runs_dir.rstrip('/')}/{name}"
    if _asked(lambda: holds_run(url), url, config):
        raise UsageError(
            f"{url} already holds a run. Go on with it by --resume {url}, or choose another training.name."
        )
    folder = _working_folder(url, config)
    if not whole_checkpoints(folder):  # of a start that never came as far as its URL
        shutil.rmtree(folder, ignore_errors=True)
    return RunPlace(folder, url)


def resumed_place(run: str, config: Config, say: Say) -> RunPlace:
    """The place of a run to go on with: a folder, or a URL, which is fetched.

    What a run that was killed on this machine left is used if it is ahead of the URL.
    """
    if not is_url(run):
        folder = Path(run).resolve()
        runs_dir = config.training.runs_dir
        return RunPlace(folder, f"{runs_dir.rstrip('/')}/{folder.name}" if is_url(runs_dir) else None)
    url = run.rstrip("/")
    place = RunPlace(_working_folder(url, config), url)
    here = max((path.name for path in whole_checkpoints(place.folder)), default="")
    there = _asked(lambda: newest_at(url), url, config)
    if here > there:
        say(f"{place.folder} on this machine has {here}, which is ahead of {url} ({there or 'no checkpoint'})")
        return place
    shutil.rmtree(place.folder, ignore_errors=True)
    say(f"fetching {url} to {place.folder}")
    fetch_run(url, place.folder, config.cluster.deadline_seconds)
    return place


def leave(place: RunPlace) -> None:
    """Delete the working folder of a run that is whole at its URL."""
    if place.url is not None:
        shutil.rmtree(place.folder)


def _working_folder(url: str, config: Config) -> Path:
    """In the model cache, which has room for models; one for each URL."""
    parent, _, name = url.rpartition("/")
    cache = Path(config.model.cache_dir).expanduser().resolve()
    return cache / "runs" / sha256(parent.encode()).hexdigest()[:12] / name


def _asked(question: Callable[[], Answer], url: str, config: Config) -> Answer:
    try:
        return within(config.cluster.deadline_seconds, question, f"Looking at {url}")
    except UsageError:
        raise
    except Exception as error:  # each filesystem of fsspec has errors of its own
        raise RunError(
            f"{url} cannot be looked at: {type(error).__name__}: {error}. Check it and the credentials."
        ) from error
