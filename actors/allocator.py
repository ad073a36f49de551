"""What serves a CPU rollout worker's memory, so that it stays what it is over thousands of steps."""

from __future__ import annotations

import os
from pathlib import Path

import ray

JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"  # Ray's wheel brings it for its own processes

# Nothing once used is given back, whatever its size: the next weight update would spend a third of its time on getting
# pages again. jemalloc finds room by size, where glibc's heap grows if none of its holes fits the largest tensor.
_JEMALLOC_SETTINGS = "narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0"
_GLIBC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}


def allocator_environment() -> dict[str, str]:
    """What the process needs from its start: jemalloc, and the same said to glibc for where that is not to be had.

    Whoever preloads libraries themselves keeps theirs. A node without this file says so in the worker's log and goes
    on with glibc.
    """
    if "LD_PRELOAD" in os.environ or not JEMALLOC.exists():
        return _GLIBC_SETTINGS
    return {**_GLIBC_SETTINGS, "LD_PRELOAD": str(JEMALLOC), "MALLOC_CONF": _JEMALLOC_SETTINGS}
