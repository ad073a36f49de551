"""Attention of packed rows by torch's variable-length kernel, for a learner that computes in 16 bits on a GPU.

Everywhere else it is SDPA's, with a mask. The kernel needs none: it is told where sequences begin and end, and
computes nothing between two of them.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

VARLEN = "pocketgrpo_varlen"
# Key and value heads that several query heads share: torch 2.11 takes them without being told.
SHARED_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
NOT_COMPUTED = ("softcap", "s_aux", "position_bias")  # what attention may be asked for and the kernel does not do


def attention_on(device: str, dtype: torch.dtype) -> str:
    """The name by which transformers knows the attention for this device; the kernel takes no 32 bits."""
    return VARLEN if device == "cuda" and dtype.itemsize == 2 else "sdpa"


def sequence_bounds(position_ids: Int[Tensor, "rows length"]) -> dict[str, Any]:
    """Where the sequences of all rows begin and end, and the length of the longest, under transformers' names.

    A sequence begins at position 0; padding counts as the end of the one before it.
    """
    positions = position_ids.flatten()
    begins = torch.nonzero(positions == 0).flatten()
    bounds = torch.cat([begins, begins.new_tensor([len(positions)])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads length width"],
    key: Float[Tensor, "rows kv_heads length width"],
    value: Float[Tensor, "rows kv_heads length width"],
    attention_mask: None,
    *,
    cu_seq_lens_q: Int[Tensor, " bounds"],
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "rows length heads width"], None]:
    """Causal attention within each sequence of the rows, in the form in which transformers asks for it.

    ValueError where a model asks for what the kernel does not compute.
    """
    if asked := [name for name in NOT_COMPUTED if others.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} asks for {', '.join(asked)}, which torch's variable-length attention does not "
            "compute; use model.dtype=float32 or another model"
        )
    rows, heads, length, width = query.shape
    q, k, v = (each.transpose(1, 2).reshape(rows * length, -1, width) for each in (query, key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    bounds, longest = cu_seq_lens_q, max_length_q
    output: Any = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, **SHARED_HEADS
    )
    return output.view(rows, length, heads, width), None


AttentionInterface.register(VARLEN, varlen_attention)
