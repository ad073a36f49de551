"""What jemalloc costs a learner's updates on a CPU, beside glibc's malloc.

    python -m benchmarks.allocator [--repeats N] [--pause SECONDS] [--path FILE]

Two learner ranks with the quickstart's model, Ray actors that differ in nothing else, update in turn on the same
batches, each of another size than the one before. Between two updates of a rank lie the other's and two pauses,
together about as long as a step samples; without a pause jemalloc looks worse, as glibc then finds its memory warm.
Prints the ratio and appends it to benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from actors.allocator import JEMALLOC, allocator_environment
from benchmarks.checkpoint_stall import start
from benchmarks.harness import RESULTS, Comparison, Sample, record
from benchmarks.learner_speed import GROUP, small_completions
from benchmarks.weight_sync import model_folder
from cluster.learner_group import LearnerGroup
from cluster.ray_session import ray_session

GROUPS = (32, 27, 31, 24, 29)
WARM_UP = len(GROUPS)


class Updates:
    """Updates on one batch after another, each timed alone, after a pause."""

    def __init__(self, learner: LearnerGroup, pause: float) -> None:
        self._learner, self._pause = learner, pause
        self._completions = small_completions(max(GROUPS))
        self._sizes = itertools.cycle(GROUPS)

    def seconds(self) -> float:
        time.sleep(self._pause)
        begun = time.perf_counter()
        self._learner.update(self._completions[: next(self._sizes) * GROUP], on_policy=False)
        return time.perf_counter() - begun


def side_by_side(repeats: int, pause: float) -> Comparison:
    """Seconds of updates with glibc's malloc (a) and with jemalloc (b)."""
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-allocator-") as scratch:
        model = model_folder("quickstart", Path(scratch))
        learners = [start(model, environment) for environment in ({}, allocator_environment("gives back"))]
        glibc, jemalloc = (Updates(learner, pause) for learner in learners)
        pairs = [(glibc.seconds(), jemalloc.seconds()) for _ in range(WARM_UP + repeats)][WARM_UP:]
    return Comparison(*(Sample(tuple(seconds)) for seconds in zip(*pairs, strict=True)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What jemalloc costs a learner's updates, beside glibc's malloc.")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.3, metavar="SECONDS", help="before every update (%(default)s)")
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    options = parser.parse_args(argv)
    if not JEMALLOC.exists():
        print(f"{JEMALLOC} is missing: this Ray brings no jemalloc, and learners use glibc's malloc.", file=sys.stderr)
        return 1
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    with ray_session("auto"):
        found = side_by_side(options.repeats, options.pause)
    print(f"a: glibc, b: jemalloc\n{found}")
    print(json.dumps(record("allocator", found.figures(), options.path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
