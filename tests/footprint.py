"""What a run has on this machine while it lives, and what is left when it is gone: processes, shared memory, ports."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import psutil

from tests.processes import marked

SHARED_MEMORY = Path("/dev/shm")
MARK = "POCKETGRPO_TEST_FOOTPRINT"
SETTLE_SECONDS = 30.0  # Ray's processes notice one after another that the driver is gone
Port = tuple[str, int]


class Footprint:
    """Of the processes that are started with `mark` in their environment; `ports`: where they were seen to listen."""

    def __init__(self) -> None:
        self.mark = {MARK: uuid.uuid4().hex}
        self.ports: dict[Port, str] = {}
        self._shared_memory = set(SHARED_MEMORY.iterdir())

    def look(self, root: psutil.Process) -> None:
        """Take down every port that this process and its descendants listen on, by TCP or UDP, and who it is."""
        for process in (root, *root.children(recursive=True)):
            try:
                for held in process.net_connections("inet"):
                    if held.status == psutil.CONN_LISTEN or (held.laddr and held.status == psutil.CONN_NONE):
                        self.ports.setdefault((held.laddr.ip, held.laddr.port), " ".join(process.cmdline()))
            except psutil.Error:
                continue

    def processes(self) -> list[psutil.Process]:
        """Those that live, orphans too."""
        return marked(MARK, self.mark[MARK])

    def left(self) -> list[str]:
        """What is still there, in words, after a while to settle."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.3)
        return left

    def _left(self) -> list[str]:
        processes = [f"process {process.pid}" for process in self.processes()]
        segments = [str(path) for path in set(SHARED_MEMORY.iterdir()) - self._shared_memory if not _mapped(path)]
        return [*processes, *segments, *(f"port {address}:{port}" for address, port in self._ports_left())]

    def _ports_left(self) -> list[Port]:
        """Ports of the run that are listened on, but for those that a process without the mark has taken since."""
        ours = {process.pid for process in self.processes()} | {None}
        listening = {
            (held.laddr.ip, held.laddr.port)
            for held in psutil.net_connections("inet")
            if held.status == psutil.CONN_LISTEN and held.laddr and held.pid in ours
        }
        return sorted(listening & set(self.ports))


def _mapped(path: Path) -> bool:
    """Whether a living process holds it: then it is another run's."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(path) in (process / "maps").read_text() or any(
                os.readlink(link) == str(path) for link in (process / "fd").iterdir()
            ):
                return True
        except OSError:
            continue
    return False
