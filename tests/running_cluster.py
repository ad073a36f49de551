"""A Ray cluster that was there before us: a head that takes no work and one node that does, both on this machine.

The node lives in a mount namespace of its own, where the system allows one, and there `hidden` is another, empty
folder: what stands in it on the head is not on the node.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from tests.processes import marked
from tests.small_run import ROOT

BIN = Path(sys.executable).parent
MARK = "POCKETGRPO_TEST_CLUSTER"
START_SECONDS = 180.0
UP = "This command will now block"
DONE = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class RunningCluster:
    """hides: whether the node really sees nothing of `hidden`."""

    folder: Path
    address: str
    environment: dict[str, str]
    hidden: Path
    hides: bool

    def ray_job(self, *arguments: str, check: bool = True) -> str:
        """What `ray job ...` prints."""
        command = [str(BIN / "ray"), "job", arguments[0], "--address", self.address, *arguments[1:]]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, cwd=ROOT, timeout=START_SECONDS
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, name: str, *entrypoint: str) -> None:
        """As a user does, from the project's folder; the terminal is gone when this returns."""
        self.ray_job("submit", "--no-wait", "--submission-id", name, "--working-dir", ".", "--", *entrypoint)

    def wait(self, name: str, seconds: float) -> str:
        """The log of a job that has ended."""
        wait_until(lambda: self.state(name) in DONE, seconds, f"job {name}")
        return self.log(name)

    def state(self, name: str) -> str:
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        answer = requests.get(f"{self.address}/api/jobs/{name}", headers=token, timeout=START_SECONDS)
        answer.raise_for_status()
        return answer.json()["status"]

    def log(self, name: str) -> str:
        return (self.folder / "head" / "session_latest" / "logs" / f"job-driver-{name}.log").read_text()

    def processes(self) -> list[psutil.Process]:
        """Those of it that live, those of its jobs too."""
        return marked(MARK, self.folder.name)

    def unpacked(self) -> list[Path]:
        """The working directories that Ray has made of what was uploaded."""
        return list(self.folder.glob("*/session_*/runtime_resources/working_dir_files/_ray_pkg_*[!k]"))


@contextmanager
def running_cluster() -> Iterator[RunningCluster]:
    """Started with a token, on free ports, in a folder of its own; all of it is gone after."""
    folder = Path(tempfile.mkdtemp(prefix="pgj"))  # short: Ray's sockets live in it
    hidden = folder / "hidden"
    hidden.mkdir()
    enter = _namespace(hidden)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "FORCE_COLOR": "1",  # a job's log has no colours all the same
        MARK: folder.name,
    }
    dashboard, gcs, client = _free_ports(3)
    common = [
        *("--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"),
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]
    head = [
        *("--head", "--num-cpus=0", f"--port={gcs}", f"--temp-dir={folder}/head", f"--ray-client-server-port={client}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
    ]
    node = [f"--address=127.0.0.1:{gcs}", "--num-cpus=2", f"--temp-dir={folder}/node"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name, before, options in (("head", [], head), ("node", enter, node)):
            command = [*before, str(BIN / "ray"), "start", *common, *options]
            processes.append(_started(command, folder / f"{name}.log", environment))
        wait_until(lambda: _answers(dashboard), START_SECONDS, "the dashboard")
        yield RunningCluster(folder, f"http://127.0.0.1:{dashboard}", environment, hidden, bool(enter))
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
        for left in marked(MARK, folder.name):
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: waited {seconds:g} s in vain"
        time.sleep(0.3)


def _started(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """`ray start`, up. It gives itself 30 s, too few on a machine that does much else, so it may try three times."""
    for _ in range(3):
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
        wait_until(lambda p=process: p.poll() is not None or UP in log.read_text(), START_SECONDS, log.stem)  # type: ignore[misc]
        if process.poll() is None:
            return process
    raise AssertionError(log.read_text())


def _namespace(hidden: Path) -> list[str]:
    """The command in front that hides the folder; empty where the system refuses one."""
    inner = f'mount -t tmpfs none {hidden} && exec "$@"'
    for options in (["--mount"], ["--mount", "--map-root-user"]):
        enter = ["unshare", *options, "sh", "-c", inner, "sh"]
        if shutil.which("unshare") and subprocess.run([*enter, "true"], capture_output=True).returncode == 0:
            return enter
    return []


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
