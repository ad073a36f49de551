"""Claims about a run that is told to stop: nothing of it is left, and while it lived only this machine heard it."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.footprint import Footprint
from tests.processes import title
from tests.small_run import arguments, start, status

SECONDS = 240.0  # of a start, on a machine that does much else
SETTINGS = ("training.steps=100000", "checkpoint.every=0", "evaluation.every=0", "cluster.dashboard_port=auto")


class Run:
    """A run of a hundred thousand steps, and what it has on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.footprint = folder / "run", Footprint()
        self._process: subprocess.Popen[str] | None = None

    def begin(self, *more: str) -> subprocess.Popen[str]:
        self._process = start(*arguments(self.folder.parent, "run", *SETTINGS, *more), **self.footprint.mark)
        return self._process

    def make_steps(self, *more: str) -> subprocess.Popen[str]:
        """Start it and wait until it has made two steps; its ports are looked at all the while."""
        process = self.begin(*more)
        root, deadline = psutil.Process(process.pid), time.monotonic() + SECONDS
        while not (self.folder / "rollouts" / "step_000002.parquet").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the run has not made two steps"
            self.footprint.look(root)
            time.sleep(1.0)
        self.footprint.look(root)
        return process

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        for process in self.footprint.processes():
            process.kill()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.kill()


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=SECONDS)
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_told_to_stop_a_run_writes_a_checkpoint_and_leaves_nothing(run: Run, number: signal.Signals, code: int) -> None:
    process = run.make_steps("cluster.learner_ranks=2") if number is signal.SIGTERM else run.make_steps()
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to the whole process group
    else:
        process.send_signal(number)
    output = ended(process)
    assert process.returncode == code, output
    assert f"--resume {run.folder}" in output
    (checkpoint,) = (run.folder / "checkpoints").glob("step_*/manifest.json")
    found = status(run.folder)
    assert found["state"] == "interrupted" and checkpoint.parent.name == f"step_{found['step']:06d}"
    assert run.footprint.left() == []
    assert_on_loopback(run.footprint)


def test_told_to_stop_while_its_actors_start_a_run_says_so_and_leaves_nothing(run: Run) -> None:
    process = run.begin()
    deadline = time.monotonic() + SECONDS
    while not any(title(each).startswith("ray::RolloutWorker") for each in run.footprint.processes()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "interrupted; there is no checkpoint to resume from" in ended(process)
    assert process.returncode == 143
    assert status(run.folder)["state"] == "interrupted"
    assert run.footprint.left() == []


def test_told_twice_a_run_leaves_at_once_and_leaves_nothing(run: Run) -> None:
    process = run.make_steps()
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    ended(process)
    assert process.returncode in (130, 143) and time.monotonic() - begin < 10
    assert run.footprint.left() == []


def assert_on_loopback(footprint: Footprint) -> None:
    """Every port of driver, Ray, learner ranks and rollout worker."""
    speakers = " ".join(footprint.ports.values())
    for part in ("gcs_server", "raylet", "dashboard", "LearnerRank", "RolloutWorker"):
        assert part in speakers, f"{part} was not seen"
    wide = {port: who for port, who in footprint.ports.items() if not _is_loopback(port[0])}
    assert wide == {}


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("127.0.0.1", True),
        ("::ffff:127.0.0.1", True),
        ("::1", True),
        ("::", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
    ],
)
def test_what_loopback_is(address: str, inside: bool) -> None:
    assert _is_loopback(address) is inside


LEAVES = """
import socket, subprocess, sys
listening = socket.create_server(("127.0.0.1", 0))
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[listening.fileno()])
open("/dev/shm/pocketgrpo-planted", "w").close()
print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_the_footprint_sees_an_orphan_its_port_and_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.footprint.SETTLE_SECONDS", 0.5)
    footprint = Footprint()
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES], env=os.environ | footprint.mark, stdin=-1, stdout=-1, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        footprint.look(psutil.Process(process.pid))
        process.kill()
        process.wait()
        left = footprint.left()
        assert f"port 127.0.0.1:{port}" in left and "/dev/shm/pocketgrpo-planted" in left
        assert any(line.startswith("process ") for line in left)
        with socket.create_server(("127.0.0.1", 0)):
            assert len(footprint.left()) == 3, "another's port does not count"
    finally:
        process.kill()
        for orphan in footprint.processes():
            orphan.kill()
        Path("/dev/shm/pocketgrpo-planted").unlink(missing_ok=True)
        process.communicate()
    assert footprint.left() == []
