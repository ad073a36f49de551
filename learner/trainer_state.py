"""What a learner rank must keep to go on exactly: fp32 masters and optimizer state, without pickle.

DeepSpeed's own checkpoints are pickles and fail on 8-bit states; this reads its live tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def master_tensors(engine: Any) -> list[torch.Tensor]:
    """This rank's fp32 master weights: flat partitions under ZeRO 1 to 3, whole parameters under ZeRO 0."""
    optimizer = engine.optimizer
    for attribute in (
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_partitioned_groups_flat",  # ZeRO 3
        "fp32_groups_flat_partition",  # ZeRO 1 in bf16
        "fp32_groups",  # ZeRO 0 in bf16
    ):
        held = getattr(optimizer, attribute, None)
        if held is not None:
            return [t for group in held for t in (group if isinstance(group, list) else [group])]
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(engine: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One memory copy of this rank's state: (tensors by name, scalars by name)."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, master in enumerate(master_tensors(engine)):
        tensors[f"master.{index}"] = master.detach().to("cpu", copy=True)
        for key, value in engine.basic_optimizer.state.get(master, {}).items():
            name = f"state.{index}.{key}"
            if isinstance(value, torch.Tensor):
                tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars[name] = value
    return tensors, scalars


def restore(engine: Any, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
    """Put a snapshot back. The model's own weights must already be those of the same checkpoint."""
    masters = master_tensors(engine)
    saved = {name for name in tensors if name.startswith("master.")}
    if len(saved) != len(masters) or any(
        tensors[f"master.{i}"].shape != master.shape for i, master in enumerate(masters)
    ):
        raise ValueError(
            f"this rank holds {len(masters)} master tensors of {[m.numel() for m in masters]} elements and the "
            f"checkpoint holds {len(saved)}; resume with the same cluster.learner_ranks and learner.zero_stage"
        )
    states: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *scalars.items()]:
        if name.startswith("state."):
            _, place, key = name.split(".", 2)
            states.setdefault(int(place), {})[key] = value
    with torch.no_grad():
        for index, master in enumerate(masters):
            master.data.copy_(tensors[f"master.{index}"])
            if index in states:
                engine.basic_optimizer.state[master] = _beside(states[index], master.device)


def _beside(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """An optimizer's state where its master is; AdamW's step count stays in the CPU's memory."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in state.items()}


def write(folder: Path, rank: int, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
    """Write a snapshot as rank_R.safetensors and rank_R.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"rank_{rank}.safetensors")
    (folder / f"rank_{rank}.json").write_text(json.dumps(scalars, indent=1))


def read(folder: Path, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write` wrote."""
    scalars = json.loads((folder / f"rank_{rank}.json").read_text())
    return load_file(folder / f"rank_{rank}.safetensors"), scalars
