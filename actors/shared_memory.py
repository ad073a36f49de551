"""Shared memory whose names are removed early, so that a process that is killed leaves none behind."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
OF_MULTIPROCESSING = ("psm_", "sem.mp-")


def unname_mapped() -> None:
    """Remove the names of Python's shared memory and semaphores that this process has mapped. What is mapped stays.

    Files are told by their inodes: a semaphore is mapped under the name that it has while it is made.
    """
    fields = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = {int(line[4]) for line in fields if len(line) == 6 and line[5].startswith(str(SHARED_MEMORY))}
    for path in SHARED_MEMORY.iterdir():
        with suppress(FileNotFoundError):
            if path.name.startswith(OF_MULTIPROCESSING) and path.stat().st_ino in mapped:
                path.unlink()
