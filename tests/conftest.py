"""What every test runs under: libraries offline, `long` tests only when asked for, nothing left behind."""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

# Set before any library reads them; child processes inherit them.
os.environ.update(
    OMP_NUM_THREADS="1",  # as a rollout worker runs: bitwise independent of the batch, and no spinning threads
    TORCHDYNAMO_DISABLE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # an actor without GPUs keeps the device variables it has
)

import psutil
import pytest

from tests.processes import marked

gc.disable()  # until every test is imported: that takes two thirds of the time then

# Every process that descends from this run carries the mark in its environment, daemons included.
MARK = "POCKETGRPO_TEST_SESSION"
os.environ[MARK] = uuid.uuid4().hex

SHARED_MEMORY = Path("/dev/shm")
# Ray and vLLM take a moment to die after they are told to.
GRACE_SECONDS = float(os.environ.get("POCKETGRPO_TEST_GRACE_SECONDS", "10"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave `long` tests out unless -m names them or a test is named by its node id."""
    if "long" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The one Ray cluster of a test session."""
    from cluster.ray_session import ray_session

    with ray_session("auto"):
        yield


def leaked_processes() -> list[str]:
    """Living descendants of this run, orphans too; Python's own resource tracker ends with its parent."""
    here = psutil.Process()
    found = {process.pid: process for process in marked(MARK, os.environ[MARK])}
    found |= {process.pid: process for process in here.children(recursive=True)}
    found.pop(here.pid, None)
    lines = []
    for process in found.values():
        try:
            command = " ".join(process.cmdline()) or process.name()
            dead = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if not dead and "multiprocessing.resource_tracker" not in command:
            lines.append(f"process {process.pid}: {command[:160]}")
    return lines


def _shared_memory() -> set[str]:
    return {str(path) for path in SHARED_MEMORY.glob("pocketgrpo*")} if SHARED_MEMORY.is_dir() else set()


def _mapped(path: str) -> bool:
    """Does any living process hold this segment? Then it belongs to another run on this machine."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if path in (process / "maps").read_text():
                return True
        except OSError:
            continue
    return False


BEFORE = _shared_memory()


def leftovers() -> list[str]:
    """What this run has started or created and not taken away."""
    segments = sorted(path for path in _shared_memory() - BEFORE if not _mapped(path))
    return leaked_processes() + [f"shared memory {path}" for path in segments]


def settled_leftovers() -> list[str]:
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := leftovers()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that leaves processes or shared memory behind fails, whatever its tests said."""
    left = settled_leftovers()
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.section("left behind by the tests", red=True)
            reporter.write_line("\n".join(left))
