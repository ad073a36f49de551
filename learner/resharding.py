"""Trainer state for another number of ranks or another ZeRO stage: put together by parameter, and cut anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.errors import RunError
from learner.optimizers import BLOCK, moments_of, put_moment, zero_state
from learner.partitions import Partition, Slice, master_tensors, partitions
from learner.trainer_state import SavedRank, restore, saved_ranks

CHUNK = BLOCK << 14  # elements that are in memory once more while they are cut anew

ReadPart = Callable[[SavedRank, int, int, int], torch.Tensor]  # float32 of (who, which master, from, to)


def load(engine: Any, folder: Path, rank: int) -> int:
    """Put back the trainer state in a folder; the policy version of it.

    Bit for bit if some rank wrote a layout like this one's (at ZeRO 0 all are alike); otherwise by name.
    """
    saved = saved_ranks(folder)
    own = partitions(engine)
    alike = [each for each in saved if each.partitions == own]
    if alike:
        restore(engine, next((each for each in alike if each.rank == rank), alike[0]))
    else:
        reshard(engine, own, saved)
    return saved[0].version


def reshard(engine: Any, own: Sequence[Partition], saved: Sequence[SavedRank]) -> None:
    """Fill this rank's masters and moments from what all ranks wrote; padding becomes zeros."""
    sources = _Sources(saved)
    optimizer = engine.basic_optimizer
    steps = max(each.steps for each in saved)
    kept = {key for each in saved for key in each.state_keys()}
    with torch.no_grad():
        for master, partition in zip(master_tensors(engine), own, strict=True):
            for begin, values in sources.chunks(partition, SavedRank.master_part):
                master.data.view(-1)[begin : begin + len(values)].copy_(values)
            if not steps:
                continue
            state = zero_state(optimizer, master, steps)
            for moment in moments_of(state):
                if moment not in kept:
                    raise RunError(
                        f"The checkpoint's optimizer kept {', '.join(moments_of(kept))}, and this one keeps {moment}. "
                        "Resume with the learner.optimizer that the run began with."
                    )
                for begin, values in sources.chunks(partition, _of_moment(moment)):
                    put_moment(state, moment, begin, values)
            optimizer.state[master] = state


def _of_moment(moment: str) -> ReadPart:
    return lambda saved, index, begin, end: saved.moment_part(index, moment, begin, end)


class _Sources:
    """Who wrote which part of each parameter."""

    def __init__(self, saved: Sequence[SavedRank]) -> None:
        self._written: dict[str, list[tuple[Slice, SavedRank, int]]] = {}
        for each in saved:
            for index, partition in enumerate(each.partitions):
                for part in partition.slices:
                    self._written.setdefault(part.name, []).append((part, each, index))

    def chunks(self, partition: Partition, read: ReadPart) -> Iterator[tuple[int, torch.Tensor]]:
        """(offset, float32 values) of a partition, piece by piece from its beginning."""
        for begin in range(0, partition.numel, CHUNK):
            end = min(begin + CHUNK, partition.numel)
            values = torch.zeros(end - begin)
            for held in partition.slices:
                first, last = max(held.offset, begin), min(held.offset + held.length, end)
                if first < last:
                    shift = held.start - held.offset
                    self._fill(values[first - begin : last - begin], held.name, first + shift, read)
            yield begin, values

    def _fill(self, values: torch.Tensor, name: str, start: int, read: ReadPart) -> None:
        """Elements of a parameter from `start` on."""
        filled = 0
        while filled < len(values):
            wanted = start + filled
            for part, saved, index in self._written.get(name, ()):
                if part.start <= wanted < part.start + part.length:
                    length = min(part.start + part.length - wanted, len(values) - filled)
                    begin = part.offset + wanted - part.start
                    values[filled : filled + length] = read(saved, index, begin, begin + length)
                    filled += length
                    break
            else:
                raise RunError(
                    f"No rank's file in the checkpoint has element {wanted} of {name}. It is of another model or other "
                    "options; resume with those that the run began with."
                )
