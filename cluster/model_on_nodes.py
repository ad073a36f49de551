"""The model on every node whose actors read it: compared, brought there, or the node that lacks it named."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import ray

from cluster.nodes import Node, ask
from configs.errors import UsageError
from configs.schema import Model
from learner.model_cache import ModelError
from learner.pretrained import is_hub_name, resolve_model

MIB = 2**20
HASHED_BYTES = 16 * MIB  # larger files, the weights, are compared by their size alone
PIECE_BYTES = 64 * MIB


def provide_model(model: Model, path: Path, nodes: Sequence[Node], seconds: float) -> list[str]:
    """Names of the nodes that were given the model of `path` now. All of `nodes` have it when this returns.

    What was made here (warm-started, converted) is copied; a hub model is fetched by each node; a folder
    must be there. UsageError naming the nodes that lack it, or have another model in its place.
    """
    others = [node for node in nodes if not node.here]
    if not others:
        return []
    here = fingerprint(path)
    lacking = [node for node, found in ask(others, fingerprint, path).items() if found is None]
    failures = {}
    if lacking and _is_made_here(model, path):
        copy_folder(path, lacking, seconds)
    elif lacking and is_hub_name(model.name):
        failures = {node: why for node, why in ask(lacking, fetch, model, seconds=seconds).items() if why}
    after = ask(others, fingerprint, path)
    missing = [node for node, found in after.items() if found is None]
    if missing:
        raise UsageError(_missing(model, path, missing, list(failures.values())))
    if different := [node.name for node, found in after.items() if found != here]:
        raise UsageError(
            f"The model folder {path} holds another model on {_listed(different)} than where the run was started. "
            "Copy it anew, or give model.name on a disk that all nodes share."
        )
    return [node.name for node in lacking]


def fingerprint(folder: Path) -> str | None:
    """One hash of the files' names and sizes, and of what is in the small ones; None if there is no such folder."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        if size <= HASHED_BYTES:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fetch(model: Model) -> str | None:
    """Fetch a hub model into this node's cache; why it could not be, or None."""
    try:
        resolve_model(model)
    except ModelError as error:
        return str(error)
    return None


def copy_folder(folder: Path, nodes: Sequence[Node], seconds: float) -> None:
    """Copy a folder to the same path on other nodes, through Ray, in pieces; it appears there whole."""
    draft = folder.with_name(f".copying-{uuid.uuid4().hex}")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            for piece in iter(lambda: file.read(PIECE_BYTES), b""):
                ask(list(nodes), append, draft / path.relative_to(folder), ray.put(piece), seconds=seconds)
    ask(list(nodes), put_in_place, draft, folder)


def append(path: Path, piece: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def put_in_place(draft: Path, folder: Path) -> None:
    """Rename the draft; where another run was faster, its copy stays."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(draft)


def _is_made_here(model: Model, path: Path) -> bool:
    return path.resolve().is_relative_to(Path(model.cache_dir).expanduser().resolve())


def _missing(model: Model, path: Path, nodes: Sequence[Node], failures: Sequence[str]) -> str:
    names = _listed([node.name for node in nodes])
    if is_hub_name(model.name):
        why = f"; there: {failures[0].rstrip('.')}" if failures else ""
        return (
            f"The model {model.name} is not on {names} (looked for {path}{why}). Fetch it there with "
            f"`hf download {model.name}`, let that node reach the hub, and set HF_HOME alike on all nodes."
        )
    return (
        f"The model folder {path} is not on {names}, whose actors read it. Copy it there, put it on a disk that all "
        "nodes share, or give a hub name in model.name."
    )


def _listed(names: Sequence[str]) -> str:
    return f"the node {names[0]}" if len(names) == 1 else f"{len(names)} nodes: {', '.join(names)}"
