"""Copies of tensors in the CPU's memory, made about as fast as memory can be copied."""

from __future__ import annotations

import mmap

import torch

BLOCK_BYTES = 1 << 26
ALIGNMENT = 64  # bytes


class MemoryCopies:
    """Makes copies in memory of its own, which goes back to the system with the last tensor in it.

    The C library's fresh memory comes in pages of 4 KiB, and to be given them takes several times as long as the
    copy; here they are of 2 MiB where the system has such.
    """

    def __init__(self) -> None:
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of the same shape and type."""
        size = tensor.numel() * tensor.element_size()
        if self._used + size > len(self._block):
            self._block, self._used = _huge_pages(max(size, BLOCK_BYTES)), 0
        place = self._block[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return place.copy_(tensor.detach())


def _huge_pages(size: int) -> torch.Tensor:
    """uint8 [size]; what of it is never written takes no memory."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
