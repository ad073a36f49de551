"""How long a checkpoint holds up the loop, beside a memory copy of the same bytes.

    python -m benchmarks.checkpoint_stall [--only quickstart|smollm2] [--repeats N] [--path FILE]

A real learner rank with 32-bit AdamW, an actor of Ray's, is saved over and over; each save deletes the one before.
The stall is `Checkpoints.begin` and every `poll` until the checkpoint is whole. The first save, which also has to be
given its memory, is told apart. Prints a Markdown table and appends its figures to benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Spread, record
from benchmarks.learner_speed import mid_completions, small_completions
from benchmarks.weight_sync import copies, model_folder
from cluster.checkpoints import Checkpoints, LoopState
from cluster.heartbeats import watched
from cluster.learner_group import LearnerGroup
from cluster.ray_session import ray_session
from configs.schema import Config
from learner.rank import LearnerRank, RankOptions

DEADLINE_SECONDS = 600.0
STEP_SECONDS = 1.0  # between two polls; a step of the quickstart takes 2


def start(model: Path) -> LearnerGroup:
    """One learner rank that has made a step, so that its optimizer has a state."""
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
    )
    actor = watched(LearnerRank).options(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    return LearnerGroup([actor.remote(Config.model_validate(sections), options)], DEADLINE_SECONDS)


def stall(name: str, repeats: int) -> dict[str, Any]:
    """Seconds of the loop's waits for each save, of a copy of the same bytes after it, and of the save in all."""
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-stall-") as scratch:
        (Path(scratch) / "model").mkdir()
        learner = start(model_folder(name, Path(scratch) / "model"))
        learner.update(small_completions(2) if name == "quickstart" else mid_completions(1), on_policy=False)
        checkpoints = Checkpoints(Path(scratch) / "checkpoints", keep=1)
        begins, polls, waits, copied, whole = [], [], [], [], []
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
            size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
            copied.append(copies(size, 3).median)
    measured = {"stall": waits, "begin": begins, "poll": polls, "copy": copied, "whole": whole}
    allowed = [2 * seconds + 0.05 for seconds in copied]
    return {
        "bytes": size,
        "first_stall_seconds": waits[0],
        **{f"{part}_seconds": Spread(tuple(seconds[1:])).figures() for part, seconds in measured.items()},
        "of_allowed": Spread(tuple(a / b for a, b in zip(waits[1:], allowed[1:], strict=True))).figures(),
    }


def row(name: str, found: dict[str, Any]) -> str:
    parts = ("stall", "begin", "poll", "copy", "whole")
    cells = [f"{1000 * found[f'{part}_seconds']['median']:.3g}" for part in parts]
    cells.append(f"{1000 * found['first_stall_seconds']:.3g}")
    share = found["of_allowed"]
    sized = f"{name}, {found['bytes'] / 1e6:.3g} MB"
    return " | ".join([f"| {sized}", *cells, f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}) |"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="How long a checkpoint holds up the loop, beside a memory copy; ends with 1 if the median of its "
        "saves took more than two copies and 50 ms."
    )
    parser.add_argument("--only", choices=("quickstart", "smollm2"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    options = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    names = [options.only] if options.only else ["quickstart", "smollm2"]
    with ray_session("auto"):
        figures = {name: stall(name, options.repeats) for name in names}
    print("| ms | stall | begin | polls | a memory copy | whole after | first stall | stall / (2 copies + 50 ms) |")
    print("|---" * 8 + "|")
    print("\n".join(row(name, found) for name, found in figures.items()))
    print(json.dumps(record("checkpoint stall", figures, options.path)))
    return int(any(found["of_allowed"]["median"] > 1 for found in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
