"""Processes of a run that are killed or frozen on purpose, and the moment at which it happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

WAIT_SECONDS = 200.0
WORKER, VERIFIER, LEARNER = "RolloutWorker", "Verifier", "LearnerRank"


def actors(run: int, *kinds: str) -> list[psutil.Process]:
    """The processes of a run's actors of these kinds: Ray names a process after the class and what it is doing."""
    names = tuple(f"ray::{kind}" for kind in kinds)
    found = [each for each in psutil.Process(run).children(recursive=True) if doing(each.pid).startswith(names)]
    return sorted(found, key=lambda process: process.pid)


def doing(pid: int) -> str:
    """What Ray says that a process is doing: `ray::LearnerRank.update`, say. Empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""


def await_(true: Callable[[], object], what: str, run: subprocess.Popen[str] | None = None) -> None:
    """AssertionError if it does not come about, or the run ends before it does."""
    end = time.monotonic() + WAIT_SECONDS
    while not true():
        if run is not None and run.poll() is not None:
            said = run.communicate()[0] if run.stdout else ""
            raise AssertionError(f"the run ended before {what}: {said}")
        if time.monotonic() > end:
            raise AssertionError(f"never came: {what}")
        time.sleep(0.002)


def steps_done(folder: Path) -> int:
    """Whole lines of training steps in a run's metrics."""
    file = folder / "metrics.jsonl"
    return sum('"time/step"' in line for line in file.read_text().splitlines()) if file.exists() else 0


def strike(
    run: subprocess.Popen[str], folder: Path, kind: str, number: signal.Signals, after_step: int, seed: int = 0
) -> None:
    """Send a signal to one actor of a kind, at a random moment of the step after `after_step`."""
    await_(lambda: steps_done(folder) >= after_step, f"step {after_step}", run)
    chance = random.Random(f"{seed}-{kind}-{after_step}")
    time.sleep(0.3 * chance.random())
    await_(lambda: actors(run.pid, kind), f"a {kind}", run)
    os.kill(chance.choice(actors(run.pid, kind)).pid, number)


@contextmanager
def slowed(process: psutil.Process, times: int, slice_seconds: float = 0.03) -> Iterator[None]:
    """Within, a process runs a slice of every `times`, and is frozen for the others."""
    over = threading.Event()

    def hold_back() -> None:
        while not over.is_set() and process.is_running():
            process.suspend()
            over.wait((times - 1) * slice_seconds)
            process.resume()
            time.sleep(slice_seconds)

    thread = threading.Thread(target=hold_back)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
