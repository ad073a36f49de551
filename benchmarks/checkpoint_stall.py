"""How long a checkpoint holds up the loop, beside a memory copy of the same bytes.

    python -m benchmarks.checkpoint_stall [--only quickstart|smollm2] [--zero-stage N] [--ranks N] [--repeats N]
        [--path FILE]

Real learner ranks with 32-bit AdamW (one, unless told otherwise), actors of Ray's, save after every update, the first
one too; each save deletes the one before. The stall is `Checkpoints.begin`, what the next update, which comes at once,
waits for the copies before its step, and every `poll` until the checkpoint is whole. The copy it is held against is
the fastest there is: of one thread, in a loop, from and to memory that is in use. Prints a Markdown table and appends
its figures to benchmarks/results.jsonl.
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
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
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
PARTS = ("begin", "update", "poll", "copy", "whole")


def start(
    model: Path, environment: Mapping[str, str] = MappingProxyType({}), zero_stage: int = 2, ranks: int = 1
) -> LearnerGroup:
    """Learner ranks, each in a process with this in its environment."""
    sections = {
        "model": {"name": str(model), "gradient_checkpointing": False},
        "rollout": {"max_completion_tokens": 192},
        "learner": {"threads": 1, "optimizer": "adamw", "zero_stage": zero_stage},
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = RankOptions(
        rank=0,
        ranks=ranks,
        address="127.0.0.1",
        port=port,
        threads=1,
        model_path=model,
        reference_path=model,
        total_updates=1,
    )
    actor = watched(LearnerRank).options(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", **environment}})
    config = Config.model_validate(sections)
    actors = [actor.remote(config, replace(options, rank=rank)) for rank in range(ranks)]
    return LearnerGroup(actors, DEADLINE_SECONDS)


def stall(name: str, repeats: int, zero_stage: int = 2, ranks: int = 1) -> dict[str, Any]:
    """Seconds of the loop's waits for each save, of a copy of the same bytes, and of the save in all; and the waits as
    shares of what two copies and 50 ms take, by the median of the copies."""
    batch = small_completions(2) if name == "quickstart" else mid_completions(ranks)
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-stall-") as scratch:
        (Path(scratch) / "model").mkdir()
        learner = start(model_folder(name, Path(scratch) / "model"), zero_stage=zero_stage, ranks=ranks)
        checkpoints = Checkpoints(Path(scratch) / "checkpoints", keep=1)
        learner.update(batch, on_policy=False)
        for step in range(repeats + 1):
            begun = time.perf_counter()
            checkpoints.begin(learner, LoopState(step, 0, step, 1, 2))
            parts["begin"].append(time.perf_counter() - begun)
            metrics = learner.update(batch, on_policy=False)
            parts["update"].append(metrics["time/checkpoint_wait"])
            parts["poll"].append(0.0)
            path = None
            while path is None:
                time.sleep(STEP_SECONDS)
                polled = time.perf_counter()
                path = checkpoints.poll(learner)
                parts["poll"][-1] += time.perf_counter() - polled
            parts["whole"].append(time.perf_counter() - begun)
            size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
            parts["copy"].append(copies(size, 3).median)
    waits = [sum(each) for each in zip(parts["begin"], parts["update"], parts["poll"], strict=True)]
    allowed = 2 * Spread(tuple(parts["copy"])).median + 0.05
    return {
        "bytes": size,
        "first_stall_seconds": waits[0],
        "first_of_allowed": waits[0] / allowed,
        "stall_seconds": Spread(tuple(waits[1:])).figures(),
        **{f"{part}_seconds": Spread(tuple(seconds[1:])).figures() for part, seconds in parts.items()},
        "of_allowed": Spread(tuple(wait / allowed for wait in waits[1:])).figures(),
    }


def row(name: str, found: dict[str, Any]) -> str:
    cells = [f"{1000 * found[f'{part}_seconds']['median']:.3g}" for part in ("stall", *PARTS)]
    cells.append(f"{1000 * found['first_stall_seconds']:.3g}")
    cells.append(f"{found['first_of_allowed']:.2f}")
    share = found["of_allowed"]
    sized = f"{name}, {found['bytes'] / 1e6:.3g} MB"
    return " | ".join([f"| {sized}", *cells, f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}) |"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="How long a checkpoint holds up the loop, beside a memory copy; ends with 1 if any save "
        "took more than two copies and 50 ms."
    )
    parser.add_argument("--only", choices=("quickstart", "smollm2"))
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    options = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    names = [options.only] if options.only else ["quickstart", "smollm2"]
    with ray_session("auto"):
        figures = {name: stall(name, options.repeats, options.zero_stage, options.ranks) for name in names}
    heads = "stall", *PARTS, "first stall", "first / allowed", "others / allowed"
    print("| ms | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    print("\n".join(row(name, found) for name, found in figures.items()))
    print(json.dumps(record("checkpoint stall", figures, options.path)))
    return int(any(max(found["of_allowed"]["max"], found["first_of_allowed"]) > 1 for found in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
