"""Processes that may end while they are looked at, and who descends from one that left a mark in its environment."""

from __future__ import annotations

import math
import time

import psutil

EXEC_SECONDS = 1.0  # a process that has just replaced its program shows no environment, for far less than this
BARE: set[psutil.Process] = set()  # those that showed none for all that time, and need not be waited for again


def marked(name: str, value: str) -> list[psutil.Process]:
    """The living processes with `name=value` in their environment, which orphans and daemons keep."""
    found, unsure, deadline = [], list(psutil.process_iter()), math.inf
    while unsure and time.monotonic() < deadline:
        again = []
        for process in unsure:
            try:
                environment = process.environ()
                if environment.get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
                elif not environment and process not in BARE and process.exe():  # the kernel's own have no program
                    again.append(process)
            except (psutil.Error, OSError):
                continue  # gone, or somebody else's
        unsure, deadline = again, min(deadline, time.monotonic() + EXEC_SECONDS)
        time.sleep(0.002 if unsure else 0.0)
    BARE.update(unsure)
    return found


def title(process: psutil.Process) -> str:
    """Its command line, which Ray's actors and vLLM's shards set to what they are; empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def gone(process: psutil.Process) -> bool:
    """Has it ended, waited for by its parent or not?"""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
