"""Copies of tensors in the CPU's memory, made about as fast as memory can be copied."""

from __future__ import annotations

import mmap

import torch

BLOCK_BYTES = 1 << 26
ALIGNMENT = 64  # bytes


class MemoryCopies:
    """Makes copies in memory of its own, again and again in the same.

    To be given fresh memory takes around ten times as long as the copy, so it is kept from one set of copies to the
    next. `lend` says that the set is not needed any more: the system takes the memory where it runs short of it.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[mmap.mmap, torch.Tensor]] = []
        self._block = self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of the same shape and type, good until `lend`."""
        size = tensor.numel() * tensor.element_size()
        while self._block < len(self._blocks) and self._used + size > len(self._blocks[self._block][1]):
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(_huge_pages(max(size, BLOCK_BYTES)))
        block = self._blocks[self._block][1]
        place = block[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += _aligned(size)
        return place.copy_(tensor.detach())

    def lend(self) -> None:
        """Let go of all copies; the next one is made in the place of the first."""
        self._block = self._used = 0
        if hasattr(mmap, "MADV_FREE"):
            for memory, _ in self._blocks:
                memory.madvise(mmap.MADV_FREE)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _huge_pages(size: int) -> tuple[mmap.mmap, torch.Tensor]:
    """Memory and uint8 [size] in it; what of it is never written takes none."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, torch.frombuffer(memory, dtype=torch.uint8)
