"""How long a checkpoint holds up the loop, beside a memory copy of the same bytes.

    python -m benchmarks.checkpoint_stall [--only quickstart|smollm2] [--repeats N] [--path FILE]

A real learner rank with 32-bit AdamW, an actor of Ray's, is saved over and over; each save deletes the one before.
The stall is `Checkpoints.begin` and every `poll` until the checkpoint is whole. The first save is told apart; it
comes ten seconds after the first update, since when the memory for it is being asked for: the best case, as a save in
that same step would wait for it. The copy it is held against is made once after each save and not in a loop, which is
the milder measure. Prints a Markdown table and appends its figures to benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.harness import RESULTS, Spread, record
from benchmarks.learner_speed import mid_completions, small_completions
from benchmarks.weight_sync import model_folder
from cluster.checkpoints import Checkpoints, LoopState
from cluster.heartbeats import watched
from cluster.learner_group import LearnerGroup
from cluster.ray_session import ray_session
from configs.schema import Config
from learner.memory_copies import MemoryCopies
from learner.rank import LearnerRank, RankOptions

DEADLINE_SECONDS = 600.0
STEP_SECONDS = 1.0  # between two polls; a step of the quickstart takes 2
FIRST_SECONDS = 10.0  # from the first update to the first save; a step of SmolLM2 takes over a minute


def start(model: Path, environment: Mapping[str, str] = MappingProxyType({})) -> LearnerGroup:
    """One learner rank, in a process with this in its environment."""
    sections = {
        "model": {"name": str(model), "gradient_checkpointing": False},
        "rollout": {"max_completion_tokens": 192},
        "learner": {"threads": 1, "optimizer": "adamw"},
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = RankOptions(
        rank=0,
        ranks=1,
        address="127.0.0.1",
        port=port,
        threads=1,
        model_path=model,
        reference_path=model,
        total_updates=1,
        saves=True,
    )
    actor = watched(LearnerRank).options(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", **environment}})
    return LearnerGroup([actor.remote(Config.model_validate(sections), options)], DEADLINE_SECONDS)


def stall(name: str, repeats: int) -> dict[str, Any]:
    """Seconds of the loop's waits for each save, of a copy of the same bytes after it, and of the save in all; and
    the waits as shares of what two copies and 50 ms take, by the median of the copies."""
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-stall-") as scratch:
        (Path(scratch) / "model").mkdir()
        learner = start(model_folder(name, Path(scratch) / "model"))
        learner.update(small_completions(2) if name == "quickstart" else mid_completions(1), on_policy=False)
        time.sleep(FIRST_SECONDS)
        checkpoints = Checkpoints(Path(scratch) / "checkpoints", keep=1)
        begins, polls, waits, copied, whole = [], [], [], [], []
        copy: RepeatedCopy | None = None
        for step in range(repeats + 1):
            begun = time.perf_counter()
            checkpoints.begin(learner, LoopState(step, 0, step, 1, 2))
            begins.append(time.perf_counter() - begun)
            polls.append(0.0)
            path = None
            while path is None:
                time.sleep(STEP_SECONDS)
                polled = time.perf_counter()
                path = checkpoints.poll(learner)
                polls[-1] += time.perf_counter() - polled
            whole.append(time.perf_counter() - begun)
            waits.append(begins[-1] + polls[-1])
            if copy is None:
                size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
                copy = RepeatedCopy(size)
            copied.append(copy.seconds())
    measured = {"stall": waits[1:], "begin": begins[1:], "poll": polls[1:], "copy": copied, "whole": whole[1:]}
    allowed = 2 * Spread(tuple(copied)).median + 0.05
    return {
        "bytes": size,
        "first_stall_seconds": waits[0],
        "first_of_allowed": waits[0] / allowed,
        **{f"{part}_seconds": Spread(tuple(seconds)).figures() for part, seconds in measured.items()},
        "of_allowed": Spread(tuple(wait / allowed for wait in waits[1:])).figures(),
    }


class RepeatedCopy:
    """A copy of so many bytes, by one thread, into memory that it has already."""

    def __init__(self, size: int) -> None:
        self._source, self._memory = torch.ones(size, dtype=torch.uint8), MemoryCopies()
        torch.set_num_threads(1)
        self.seconds()

    def seconds(self) -> float:
        begun = time.perf_counter()
        self._memory.copy(self._source)
        took = time.perf_counter() - begun
        self._memory.lend()
        return took


def row(name: str, found: dict[str, Any]) -> str:
    parts = ("stall", "begin", "poll", "copy", "whole")
    cells = [f"{1000 * found[f'{part}_seconds']['median']:.3g}" for part in parts]
    cells.append(f"{1000 * found['first_stall_seconds']:.3g}")
    cells.append(f"{found['first_of_allowed']:.2f}")
    share = found["of_allowed"]
    sized = f"{name}, {found['bytes'] / 1e6:.3g} MB"
    return " | ".join([f"| {sized}", *cells, f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}) |"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="How long a checkpoint holds up the loop, beside a memory copy; ends with 1 if the first or "
        "the median of its saves took more than two copies and 50 ms."
    )
    parser.add_argument("--only", choices=("quickstart", "smollm2"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    options = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    names = [options.only] if options.only else ["quickstart", "smollm2"]
    with ray_session("auto"):
        figures = {name: stall(name, options.repeats) for name in names}
    print("| ms | stall | begin | polls | a copy | whole after | first stall | first / allowed | others / allowed |")
    print("|---" * 9 + "|")
    print("\n".join(row(name, found) for name, found in figures.items()))
    print(json.dumps(record("checkpoint stall", figures, options.path)))
    return int(any(max(found["of_allowed"]["median"], found["first_of_allowed"]) > 1 for found in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
