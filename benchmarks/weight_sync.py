"""What a weight sync costs beside a copy of the same bytes, and the parts it is made of.

    python -m benchmarks.weight_sync [--only quickstart|smollm2] [--repeats N] [--path FILE]

A real rollout worker and a real learner rank, each an actor of Ray's. Prints a Markdown table and appends its
figures to benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.restarts import Restarts
from benchmarks.harness import RESULTS, Spread, measure, record
from benchmarks.learner_speed import small_model
from cluster.nodes import nodes_for_actors
from cluster.placement import place
from cluster.ray_session import ray_session
from cluster.start import Actors, connect_weights, start_actors
from configs.schema import Config, Model
from data.tokenizer import build_tokenizer
from learner.model_cache import quiet_transformers
from learner.pretrained import SMOLLM2_WHEEL, resolve_model

PARTS = ("gather", "copy", "load", "repack")


def model_folder(name: str, scratch: Path) -> Path:
    """The quickstart's model, untrained, or SmolLM2."""
    if name == "smollm2":
        return resolve_model(Model(name=SMOLLM2_WHEEL, dtype="float32"))
    with quiet_transformers():
        small_model().save_pretrained(scratch)
    build_tokenizer().save_pretrained(scratch)
    return scratch


def small_config(model: Path) -> Config:
    """One rollout worker and one learner rank around this model, with short completions."""
    sections = {
        "model": {"name": str(model), "gradient_checkpointing": False},
        "rollout": {"kv_cache_mb": 64, "max_completion_tokens": 32},
        "learner": {"threads": 1},
    }
    return Config.model_validate(sections)


def start(config: Config, model: Path) -> Actors:
    """The actors of a config, connected."""
    actors = start_actors(config, place(config, nodes_for_actors()), model, model, 0, model, Restarts(print), print)
    connect_weights(config, actors)
    return actors


def copies(size: int, repeats: int) -> Spread:
    """Seconds of copying so many bytes from one place in memory to another, by one thread."""
    torch.set_num_threads(1)
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return measure(lambda: target.copy_(source), repeats)


def sync(name: str, repeats: int) -> dict[str, Any]:
    """Seconds of a sync, of its parts and of a copy of the same bytes, taken in turn; and how many copies a sync is."""
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-sync-") as scratch:
        folder = model_folder(name, Path(scratch))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        actors = start(small_config(folder), folder)
        try:
            actors.learner.sync_weights()
            whole, copy, parts = [], [], []
            for _ in range(repeats):
                begun = time.perf_counter()
                parts.append(actors.learner.sync_weights())
                whole.append(time.perf_counter() - begun)
                copy.append(copies(size, 3).median)
        finally:
            actors.stop()
    return {
        "bytes": size,
        "seconds": Spread(tuple(whole)).figures(),
        "parts": {part: Spread(tuple(each[f"time/sync_{part}"] for each in parts)).figures() for part in PARTS},
        "copy_seconds": Spread(tuple(copy)).figures(),
        "copies": Spread(tuple(a / b for a, b in zip(whole, copy, strict=True))).figures(),
    }


def row(name: str, found: dict[str, Any]) -> str:
    ms = [found["seconds"], *found["parts"].values(), found["copy_seconds"]]
    cells = [f"{1000 * figures['median']:.3g}" for figures in ms]
    ratio = found["copies"]
    sized = f"{name}, {found['bytes'] / 1e6:.3g} MB"
    return " | ".join([f"| {sized}", *cells, f"{ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g}) |"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a weight sync costs, beside a copy of the same bytes.")
    parser.add_argument("--only", choices=("quickstart", "smollm2"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    options = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    names = [options.only] if options.only else ["quickstart", "smollm2"]
    with ray_session("auto"):
        figures = {name: sync(name, options.repeats) for name in names}
    print("| milliseconds | sync | " + " | ".join(PARTS) + " | a memory copy | copies a sync |")
    print("|---" * 8 + "|")
    print("\n".join(row(name, found) for name, found in figures.items()))
    print(json.dumps(record("weight sync", figures, options.path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
