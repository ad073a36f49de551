"""Claims about a run that is told to stop: nothing of it is left, and while it lived only this machine heard it."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.footprint import Footprint
from tests.small_run import arguments, start, status

SECONDS = 150.0
SETTINGS = ("training.steps=100000", "checkpoint.every=0", "evaluation.every=0")


def running(folder: Path, footprint: Footprint, monkeypatch: pytest.MonkeyPatch, *more: str) -> subprocess.Popen[str]:
    """A run that has made two steps; its ports were looked at all the while."""
    for name, value in footprint.mark.items():
        monkeypatch.setenv(name, value)
    process = start(*arguments(folder, "run", *SETTINGS, *more))
    root = psutil.Process(process.pid)
    deadline = time.monotonic() + SECONDS
    while not (folder / "run" / "rollouts" / "step_000002.parquet").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        footprint.look(root)
        time.sleep(1.0)
    footprint.look(root)
    return process


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=SECONDS)
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_told_to_stop_a_run_writes_a_checkpoint_and_leaves_nothing(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, footprint = tmp_path / "run", Footprint()
    more = ("cluster.learner_ranks=2",) if number is signal.SIGTERM else ()
    process = running(tmp_path, footprint, monkeypatch, *more)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to the whole process group
    else:
        process.send_signal(number)
    output = ended(process)
    assert process.returncode == code, output
    assert f"--resume {run}" in output
    (checkpoint,) = (run / "checkpoints").glob("step_*/manifest.json")
    assert status(run)["state"] == "interrupted" and checkpoint.parent.name == f"step_{status(run)['step']:06d}"
    assert footprint.left() == []
    assert_on_loopback(footprint)


def test_told_twice_a_run_leaves_at_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footprint = Footprint()
    process = running(tmp_path, footprint, monkeypatch)
    start_ = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    ended(process)
    assert process.returncode in (130, 143) and time.monotonic() - start_ < 10
    assert footprint.left() == []


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
