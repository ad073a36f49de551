"""A rank's fp32 masters, and which part of which parameter lies where in them: read off the live DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Names = dict[int, str]  # of parameters, by their ids


class Slice(NamedTuple):
    """`length` elements of a parameter, from its element `start` on, that lie from `offset` on in a master."""

    name: str
    start: int
    length: int
    offset: int


class Partition(NamedTuple):
    """What a master of `numel` elements holds; between its slices and after them there is padding."""

    numel: int
    slices: tuple[Slice, ...]


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


def partitions(engine: Any) -> list[Partition]:
    """What each of the `master_tensors` holds, in their order. The layout of two ranks alike is equal."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    slices = _slices(engine.optimizer, names)
    masters = master_tensors(engine)
    return [Partition(master.numel(), held) for master, held in zip(masters, slices, strict=True)]


def _slices(optimizer: Any, names: Names) -> list[tuple[Slice, ...]]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        return [_cut_one_by_one(group, names) for group in optimizer.fp16_groups]
    for attribute in ("bit16_groups", "bf16_groups"):  # ZeRO 1 and 2; ZeRO 1 in bf16
        if hasattr(optimizer, attribute):
            return [_cut_together(group, names) for group in getattr(optimizer, attribute)]
    groups = getattr(optimizer, "fp16_groups", None)  # ZeRO 0 in bf16
    groups = groups or [group["params"] for group in optimizer.param_groups]
    return [(Slice(names[id(p)], 0, p.numel(), 0),) for group in groups for p in group]


def _cut_together(group: Iterable[Any], names: Names) -> tuple[Slice, ...]:
    """Of parameters that were laid one after another and then cut; one that this rank has no part of is not linked."""
    linked = [(names[id(p)], p._hp_mapping) for p in group if p._hp_mapping is not None]
    return tuple(
        Slice(name, at.lp_fragment_address.start, at.lp_fragment_address.numel, at.hp_fragment_address.start)
        for name, at in linked
    )


def _cut_one_by_one(group: Iterable[Any], names: Names) -> tuple[Slice, ...]:
    """Of parameters each of which was cut into equal parts, the last one padded."""
    slices, offset = [], 0
    for parameter in group:
        part = parameter.partition_numel()
        start = part * dist.get_rank()
        length = min(part, parameter.ds_numel - start)
        if length > 0:
            slices.append(Slice(names[id(parameter)], start, length, offset))
        offset += part
    return tuple(slices)
