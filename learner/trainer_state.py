"""What a learner rank must keep to go on exactly: fp32 masters and optimizer state, without pickle.

DeepSpeed's own checkpoints are pickles and fail on 8-bit states; this reads its live tensors. Each rank writes
rank_R.safetensors (`master.I`, `state.I.KEY`) and rank_R.json: scalars, the policy version, and what the masters hold.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from learner.checkpoint_writer import write_tensors
from learner.memory_copies import MemoryCopies
from learner.optimizers import BLOCK, dequantised, scale_keys
from learner.partitions import Partition, Slice, master_tensors, partitions

Tensors = dict[str, torch.Tensor]


def live_state(engine: Any) -> dict[str, Any]:
    """This rank's masters and their optimizer states as they are, no copies: tensors and scalars by name."""
    live: dict[str, Any] = {}
    for index, master in enumerate(master_tensors(engine)):
        live[f"master.{index}"] = master
        states = engine.basic_optimizer.state.get(master, {})
        live |= {f"state.{index}.{key}": value for key, value in states.items()}
    return live


def snapshot(engine: Any, version: int, memory: MemoryCopies) -> tuple[Tensors, dict[str, Any]]:
    """One memory copy of this rank's state: (tensors by name, what goes into the JSON)."""
    live = live_state(engine)
    tensors = {name: memory.copy(value) for name, value in live.items() if isinstance(value, torch.Tensor)}
    scalars = {name: value for name, value in live.items() if not isinstance(value, torch.Tensor)}
    return tensors, {"version": version, "scalars": scalars, "partitions": partitions(engine)}


def write(folder: Path, rank: int, tensors: Tensors, facts: dict[str, Any]) -> None:
    """Write a snapshot as rank_R.safetensors and rank_R.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / f"rank_{rank}.safetensors")
    (folder / f"rank_{rank}.json").write_text(json.dumps(facts))


class SavedRank:
    """What one rank wrote. Tensors are read when they are asked for, and as much of them as is asked for."""

    def __init__(self, folder: Path, rank: int) -> None:
        facts = json.loads((folder / f"rank_{rank}.json").read_text())
        self.rank = rank
        self.version: int = facts["version"]
        self.partitions = [
            Partition(numel, tuple(Slice(*each) for each in slices)) for numel, slices in facts["partitions"]
        ]
        self._scalars: dict[str, Any] = facts["scalars"]
        self._file = safe_open(folder / f"rank_{rank}.safetensors", framework="pt")

    @cached_property
    def _names(self) -> set[str]:
        return set(self._file.keys())

    def master(self, index: int) -> torch.Tensor:
        return self._file.get_tensor(f"master.{index}")

    def state(self, index: int) -> dict[str, Any]:
        """The optimizer's state of a master, whole; empty if it has none."""
        prefix = f"state.{index}."
        tensors = {n.removeprefix(prefix): self._file.get_tensor(n) for n in self._names if n.startswith(prefix)}
        return tensors | {n.removeprefix(prefix): v for n, v in self._scalars.items() if n.startswith(prefix)}

    def state_keys(self) -> set[str]:
        """Which keys there are in any state."""
        return {name.split(".", 2)[2] for name in (*self._names, *self._scalars) if name.startswith("state.")}

    @property
    def steps(self) -> int:
        """The optimizer's steps so far: 0 where it has no state."""
        counts = [self._scalars[name] for name in self._scalars if name.endswith(".step")]
        counts += [self._file.get_tensor(name).item() for name in self._names if name.endswith(".step")]
        return int(max(counts, default=0))

    def master_part(self, index: int, begin: int, end: int) -> torch.Tensor:
        """float32 [end - begin] of a master."""
        return self._part(f"master.{index}", begin, end)

    def moment_part(self, index: int, moment: str, begin: int, end: int) -> torch.Tensor:
        """float32 [end - begin] of a moment, dequantised if it is in 8 bits; zeros if there is no state."""
        name = f"state.{index}.{moment}"
        if name not in self._names:
            return torch.zeros(end - begin)
        if self._file.get_slice(name).get_dtype() != "U8":
            return self._part(name, begin, end)
        scales, meaning = (f"state.{index}.{key}" for key in scale_keys(moment))
        first = begin // BLOCK
        codes = self._part(name, first * BLOCK, end)
        values = dequantised(codes, self._part(scales, first, -(-end // BLOCK)), self._file.get_tensor(meaning))
        return values[begin - first * BLOCK :]

    def _part(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Elements begin to end of a tensor of any shape, flat."""
        stored = self._file.get_slice(name)
        row = 1
        for size in stored.get_shape()[1:]:
            row *= size
        rows: torch.Tensor = stored[begin // row : -(-end // row)]
        return rows.reshape(-1)[begin % row :][: end - begin]


def saved_ranks(folder: Path) -> list[SavedRank]:
    """What every rank wrote, by rank."""
    found = sorted(int(path.stem.removeprefix("rank_")) for path in folder.glob("rank_*.json"))
    return [SavedRank(folder, rank) for rank in found]


def restore(engine: Any, saved: SavedRank) -> None:
    """Put back, bit for bit, what a rank of the same layout wrote. The model's own weights must already be those of
    the same checkpoint."""
    with torch.no_grad():
        for index, master in enumerate(master_tensors(engine)):
            master.data.copy_(saved.master(index))
            if state := saved.state(index):
                engine.basic_optimizer.state[master] = _beside(state, master.device)


def _beside(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """An optimizer's state where its master is; AdamW's step count stays in the CPU's memory."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in state.items()}
