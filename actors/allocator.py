"""What serves the memory of processes that compute on a CPU, so that it stays what it is over thousands of steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import ray

Kind = Literal["keeps", "gives back"]

JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"  # Ray's wheel brings it for its own processes

# jemalloc finds room by size, where glibc's heap grows whenever none of its holes fits a tensor.
_JEMALLOC: dict[Kind, str] = {
    "keeps": "narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0",
    "gives back": "narenas:1,dirty_decay_ms:1000,muzzy_decay_ms:0,background_thread:true",
}
_GLIBC: dict[Kind, dict[str, str]] = {
    "keeps": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
    },
    "gives back": {},
}


def allocator_environment(kind: Kind) -> dict[str, str]:
    """What a process needs in its environment from its start: jemalloc, and for glibc the same, where that is missing.

    kind: "keeps" what was used once, as a rollout worker must: a weight update would spend a third of its time on
    getting pages again; "gives back" what was not used for a second, for a process with tensors of many sizes. What
    this process was told to preload comes first, so another allocator in it wins. A node without this file says so in
    the process's log and goes on with glibc.
    """
    if not JEMALLOC.exists():
        return _GLIBC[kind]
    preloaded = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(JEMALLOC)]))
    return {**_GLIBC[kind], "LD_PRELOAD": preloaded, "MALLOC_CONF": _JEMALLOC[kind]}
