"""AdamW in 32 and in 8 bits, and the form of its moments. The only file that knows bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from configs.schema import Learner

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")  # as torch names them, and bitsandbytes
BLOCK = 256  # elements that share a scale (`absmax`) in 8 bits


def build_optimizer(module: torch.nn.Module, learner: Learner) -> torch.optim.Optimizer:
    """The optimizer of `learner.optimizer`; matrices decay, vectors (norms, biases) do not.

    Its learning rate is 0 until the first update sets it: some DeepSpeed wrappers step once on zero
    gradients when they are built, and that step must change no weight.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": learner.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": 0.0, "betas": learner.betas}
    if learner.eight_bit:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        return (PagedAdamW8bit if learner.optimizer == "paged_adamw_8bit" else AdamW8bit)(groups, **options)
    return torch.optim.AdamW(groups, **options)


def zero_state(optimizer: Any, master: torch.Tensor, steps: int) -> dict[str, Any]:
    """The optimizer's state of a master after so many steps, its moments zero."""
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.tensor(float(steps)), **moments}
    alone = type(optimizer)([master])
    alone.init_state(alone.param_groups[0], master, 0, 0)  # in 32 bits if the master is a small one
    return {**alone.state[master], "step": steps}


def moments_of(keys: Iterable[str]) -> list[str]:
    """Which of a state's keys name moments."""
    return [key for key in MOMENTS if key in keys]


def scale_keys(moment: str) -> tuple[str, str]:
    """The keys of an 8-bit moment's scales (absmax) and of what its codes mean (qmap)."""
    return moment.replace("state", "absmax"), moment.replace("state", "qmap")


def dequantised(codes: torch.Tensor, scales: torch.Tensor, meaning: torch.Tensor) -> torch.Tensor:
    """float32 of 8-bit codes [n], which begin where a block does; scales float32 [ceil(n / BLOCK)]."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=scales, code=meaning, blocksize=BLOCK)


def put_moment(state: dict[str, Any], moment: str, begin: int, values: torch.Tensor) -> None:
    """Write float32 `values` into a moment from its element `begin` on, a multiple of BLOCK; quantised if it is."""
    place = state[moment].view(-1)[begin : begin + len(values)]
    if place.dtype != torch.uint8:
        place.copy_(values)
        return
    from bitsandbytes.functional import quantize_blockwise

    scales, meaning = (state[key] for key in scale_keys(moment))
    codes, found = quantize_blockwise(values, code=meaning.cpu(), blocksize=BLOCK)
    place.copy_(codes)
    scales[begin // BLOCK :][: len(found.absmax)].copy_(found.absmax)
