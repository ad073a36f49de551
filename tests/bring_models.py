"""A job: what `provide_model` does with four folders, as JSON. Its argument: a folder that the node sees empty."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from cluster.model_on_nodes import provide_model
from cluster.nodes import ask, nodes_for_actors
from cluster.ray_session import ray_session
from configs.errors import RunError, UsageError
from configs.schema import Model


def outcome(name: str, folder: Path, cache: Path) -> str:
    try:
        return f"brought to {len(provide_model(Model(name=name, cache_dir=str(cache)), folder, nodes, 60.0))}"
    except UsageError as error:
        return str(error)


def mark(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content)
    return folder


def package_path() -> str:
    import cluster.nodes

    return cluster.nodes.__file__


def hang() -> None:
    import time

    time.sleep(60)


signal.signal(signal.SIGTERM, signal.default_int_handler)
with ray_session("auto"):
    hidden, seen = Path(sys.argv[1]), Path(sys.argv[2])
    nodes = nodes_for_actors()
    made = mark(hidden / "cache" / "made", "here")
    large = made / "model.safetensors"
    large.write_bytes(bytes(range(256)) * 4096 * 70)  # more than a piece
    other = mark(hidden / "other", "here")
    ask(nodes, mark, other, "there")
    found = {
        "shared": outcome(str(seen), mark(seen, "here"), seen.parent / "cache"),
        "made": outcome("tiny-arithmetic", made, hidden / "cache"),
        "again": outcome("tiny-arithmetic", made, hidden / "cache"),
        "missing": outcome(str(hidden / "model"), mark(hidden / "model", "here"), hidden / "cache"),
        "other": outcome(str(other), other, hidden / "cache"),
        "hub": outcome("nobody/no-such-model", mark(hidden / "snapshot", "here"), hidden / "cache"),
        "told to stop": signal.getsignal(signal.SIGTERM) is signal.default_int_handler,
        "packages": [ask(nodes, package_path)[node] for node in nodes],
    }
    try:
        ask(nodes, hang, seconds=1.0)
    except RunError as error:
        found["late"] = str(error)
    print(json.dumps(found))
