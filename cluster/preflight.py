"""What can be known to fail before any actor starts: what is wrong is said all at once, each with its fix."""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from cluster.curation import Say, check_dataset
from cluster.engine_fit import check_engine
from cluster.jobs import current_job, unlasting_runs_dir
from cluster.machine import (
    Machine,
    few_open_files,
    look,
    no_peer_access,
    object_store_on_disk,
    old_driver,
    small_shared_memory,
    untested_libraries,
)
from cluster.nodes import Node, ask
from cluster.run_place import RunPlace
from configs.errors import UsageError
from configs.schema import BUILT_IN_MODEL, Config
from configs.urls import is_url, open_filesystem
from data.errors import DatasetError
from data.prompts import check_template, make_template
from data.tokenizer import build_tokenizer
from learner.model_cache import ModelError
from learner.model_folder import Header, read_headers
from learner.pretrained import SMOLLM2_WHEEL, find_here
from learner.warm_start import llama_config
from rewards import check_weights

MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2}
MIN_FREE_DISK_BYTES = 256 * MIB


def check_before_ray(config: Config, say: Say) -> None:
    """Reward names, the data block, the model as far as it is here, where the run folder goes and its free disk.

    UsageError naming every fix.
    """
    refuse([_rewards(config), _data(config, say), _model(config), *_places(config)])


def refuse(findings: Iterable[str | None]) -> None:
    """UsageError with all findings that are not None, numbered if there are several."""
    found = [text if text.endswith((".", "?")) else f"{text}." for text in dict.fromkeys(findings) if text]
    if len(found) == 1:
        raise UsageError(found[0])
    if found:
        listed = " ".join(f"({number}) {text}" for number, text in enumerate(found, 1))
        raise UsageError(f"The run cannot start, for {len(found)} reasons. {listed}")


def _rewards(config: Config) -> str | None:
    try:
        check_weights(config.rewards.weights)
    except ValueError as error:
        return str(error)
    return None


def _data(config: Config, say: Say) -> str | None:
    try:
        check_dataset(config, say)
    except UsageError as error:
        return str(error)
    return None


def _model(config: Config) -> str | None:
    """A folder's parts, whether they fit each other and the config, and a chat template, whosever it is."""
    model = config.model
    try:
        here = None if model.name == BUILT_IN_MODEL else find_here(model)
        tokenizer = here.tokenizer if here else build_tokenizer(config.rewards.reasoning_tag, config.rewards.answer_tag)
        if here or config.data.chat_template != "model":
            check_template(tokenizer, make_template(config.data, config.rewards.reasoning_tag))
        if here:
            check_engine(config, here.config)
        elif model.name == BUILT_IN_MODEL:
            check_engine(config, llama_config(model.warm_start, tokenizer))
    except (ModelError, DatasetError, UsageError) as error:
        return str(error)
    return None


def _places(config: Config) -> list[str | None]:
    """What is wrong with the folders that a run writes to."""
    runs_dir, model = config.training.runs_dir, config.model
    made_here = model.name in (BUILT_IN_MODEL, SMOLLM2_WHEEL) or model.name.endswith(".gguf")
    cache = [_unwritable(model.cache_dir, "model.cache_dir")] if made_here or is_url(runs_dir) else []
    if not is_url(runs_dir):
        lasting = unlasting_runs_dir(runs_dir, current_job())
        return [lasting, _unwritable(runs_dir, "training.runs_dir"), _disk(Path(runs_dir), "training.runs_dir"), *cache]
    try:
        open_filesystem(runs_dir)
    except UsageError as error:
        return [str(error)]
    return [*cache, _disk(Path(model.cache_dir), "model.cache_dir")]


def _unwritable(folder: str, option: str) -> str | None:
    """Asked by writing a file without a name where the folder is or would be made: rights and read-only disks alike."""
    nearest = _nearest(Path(folder))
    try:
        with suppress(FileNotFoundError):
            os.lstat(os.path.expanduser(folder))  # a name too long is not too long for what stands above it
        with TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{option}={folder} cannot be written: {nearest}: {error.strerror}. Choose another {option}"


def _disk(folder: Path, option: str) -> str | None:
    free, folder = _free_disk(folder)
    if free >= MIN_FREE_DISK_BYTES:
        return None
    return (
        f"Only {free / MIB:.0f} MiB are free on the disk of {option} ({folder}); a run needs at least "
        f"{MIN_FREE_DISK_BYTES / MIB:.0f}. Free some, or choose another {option}"
    )


def _free_disk(folder: Path) -> tuple[int, Path]:
    """Bytes free where this folder is or would be made, and the nearest folder that exists."""
    folder = _nearest(folder)
    return shutil.disk_usage(folder).free, folder


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that something stands at, be it a file."""
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def check_nodes(
    config: Config, nodes: Sequence[Node], machines: Sequence[tuple[Machine, int]], place: RunPlace, say: Say
) -> None:
    """What the machines of the cluster lack, before any model loads: UsageError for all that stops a run.

    What only slows it, and versions outside the tested range, are said. machines: those of the nodes.
    """
    bucket = config.cluster.sync_bucket_mb * MIB
    for machine, store in machines:
        warnings = (
            object_store_on_disk(machine, bucket, store),
            few_open_files(machine),
            no_peer_access(machine),
            untested_libraries(machine),
        )
        for text in filter(None, warnings):
            say(f"warning: {machine.name}: {text}")
    errors = [(machine, old_driver(machine)) for machine, _ in machines]
    refuse([*(f"{machine.name}: {text}" for machine, text in errors if text), _unshared(place, nodes)])


def machines_of(nodes: Sequence[Node]) -> list[tuple[Machine, int]]:
    """The facts of every node, and the bytes of Ray's object store on it; this machine's without a Ray task."""
    away = [node for node in nodes if not node.here]
    found = ask(away, look) if away else {}
    return [(found.get(node) or look(), int(node.resources.get("object_store_memory", 0))) for node in nodes]


def _unshared(place: RunPlace, nodes: Sequence[Node]) -> str | None:
    """Learner ranks write checkpoints, and a resumed run's actors read them, each on its own node."""
    away = [node for node in nodes if not node.here]
    if not away:
        return None
    place.folder.parent.mkdir(parents=True, exist_ok=True)
    probe = place.folder.parent / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        blind = [node.name for node, seen in ask(away, Path.exists, probe).items() if not seen]
    finally:
        probe.unlink()
    if not blind:
        return None
    option = "training.runs_dir" if place.url is None else "model.cache_dir, where a run at a URL works,"
    return (
        f"{option} ({probe.parent}) is not the same disk on {', '.join(blind)}, where learner ranks would write "
        "checkpoints that nobody finds: put it on a disk that all nodes share"
    )


def check_disk(config: Config, model_path: Path, place: RunPlace) -> None:
    """The disk must hold the checkpoints that are kept, the best, and the one being written."""
    training, checkpoint = config.training, config.checkpoint
    made = 1 + (math.ceil(training.steps / checkpoint.every) if checkpoint.every else 0)
    count = min(made, checkpoint.keep + 2)
    each = checkpoint_bytes(config, parameters_of(model_path))
    option = "training.runs_dir" if place.url is None else "model.cache_dir"
    refuse([small_disk(_free_disk(place.folder.parent)[0], count, each, option)])


def small_disk(free: int, count: int, each: int, option: str) -> str | None:
    """An error: `count` checkpoints of `each` bytes do not fit into the `free` ones."""
    if free >= count * each:
        return None
    return (
        f"{count} checkpoints of about {each / MIB:,.0f} MiB do not fit into the {free / MIB:,.0f} MiB free on "
        f"the disk of {option}: free some, lower checkpoint.keep (which is kept besides the best and the one being "
        f"written), or choose another {option}"
    )


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Roughly: the model, and of what is trained the fp32 masters and AdamW's two moments."""
    model = parameters * BYTES[config.model.dtype]
    if config.model.lora_rank:
        return int(1.05 * model)  # adapters and their state are small
    return model + parameters * (4 + (2 if config.learner.eight_bit else 8))


def check_shared_memory(config: Config, model_path: Path, machines: Sequence[Machine]) -> None:
    """Without a GPU weights travel through a machine's shared memory: there must be enough for what that takes."""
    import torch

    from cluster.weight_sender_cpu import shared_bytes

    dtype = getattr(torch, config.model.dtype)
    shapes = {name: (header.shape, dtype) for name, header in _headers(model_path)}
    taken = shared_bytes(shapes, config.cluster.sync_bucket_mb * MIB)
    errors = [(machine, small_shared_memory(machine, taken)) for machine in machines]
    refuse(f"{machine.name}: {text}" for machine, text in errors if text)


def parameters_of(model_path: Path) -> int:
    """Number of weights, from the headers of the safetensors files."""
    return sum(math.prod(header.shape) for _, header in _headers(model_path))


def _headers(model_path: Path) -> Iterator[tuple[str, Header]]:
    for path in model_path.glob("*.safetensors"):
        yield from read_headers(path).items()
