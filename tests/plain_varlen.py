"""torch's variable-length attention on a CPU, for which it has no kernel: one sequence at a time, in plain arithmetic.

Importing this file gives torch's own operators this implementation, so that all that calls them runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


def _sequences(bounds: Tensor, longest: int, tokens: int) -> Iterator[slice]:
    """The sequences, where the bounds are as the kernel on a GPU needs them."""
    assert bounds.dtype == torch.int32 and int(bounds[0]) == 0 and int(bounds[-1]) == tokens
    for begin, end in pairwise(bounds.tolist()):
        assert 0 < end - begin <= longest, "the kernel would leave out what is beyond the longest sequence"
        yield slice(begin, end)


def _probabilities(query: Tensor, key: Tensor, scale: float, window: list[int]) -> Tensor:
    """[heads, length, length] of one sequence; window: how far back and ahead a token sees, -1 for all."""
    place = torch.arange(query.shape[1])
    ahead = place - place[:, None]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    for limit, distance in zip(window, (-ahead, ahead), strict=True):
        hidden |= (distance > limit) & (limit >= 0)
    return (query @ key.mT * scale).masked_fill(hidden, -torch.inf).softmax(dim=-1)


def _heads(flat: Tensor, part: slice, heads: int) -> Tensor:
    """float32 [heads, length, width] of one sequence; heads of keys and values are shared by groups."""
    own = flat[part].transpose(0, 1).float()
    return own.repeat_interleave(heads // len(own), dim=0)


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, width = query.shape
    output = torch.empty_like(query)
    for part in _sequences(cu_seq_q, max_q, tokens):
        q, k, v = (_heads(each, part, heads) for each in (query, key, value))
        probabilities = _probabilities(q, k, scale or width**-0.5, window_size or [-1, -1])
        output[part] = (probabilities @ v).transpose(0, 1).to(query.dtype)
    return output, torch.zeros(heads, tokens), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, width = query.shape
    scale = scale or width**-0.5
    grads = [torch.empty_like(each) for each in (query, key, value)]
    for part in _sequences(cu_seq_q, max_q, tokens):
        q, k, v, g = (_heads(each, part, heads) for each in (query, key, value, grad))
        probabilities = _probabilities(q, k, scale, window_size or [-1, -1])
        of_probabilities = g @ v.mT
        mean = (of_probabilities * probabilities).sum(dim=-1, keepdim=True)
        of_scores = probabilities * (of_probabilities - mean) * scale
        for total, found in zip(grads, (of_scores @ k, of_scores.mT @ q, probabilities.mT @ g), strict=True):
            shared = found.unflatten(0, (total.shape[1], -1)).sum(dim=1)
            total[part] = shared.transpose(0, 1).to(total.dtype)
    return grads[0], grads[1], grads[2]
