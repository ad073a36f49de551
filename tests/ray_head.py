"""A Ray head as `ray start` makes one, with a token or without, and what becomes of a driver that joins it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.processes import marked
from tests.running_cluster import BIN, MARK, _free_ports, _started
from tests.small_run import ROOT

JOIN = """
import sys
from cluster.ray_session import ray_session
from configs.errors import RunError, UsageError
try:
    with ray_session("auto") as line:
        import ray
        print(line, "|", len(ray.nodes()))
except (RunError, UsageError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@dataclass(frozen=True)
class Head:
    """home: a user's home in which there is no token. address: of the GCS; dashboard: its URL."""

    home: Path
    address: str
    dashboard: str

    def joined(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """A driver of ours that joins, with these variables of Ray's."""
        return run(
            [sys.executable, "-c", JOIN], clean_environment(self.home) | {"RAY_ADDRESS": self.address} | variables
        )


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def clean_environment(home: Path) -> dict[str, str]:
    """This process's environment without its Ray, of a user whose home this is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


@contextmanager
def ray_head(token: str | None) -> Iterator[Head]:
    """Started without actors in mind, on free ports; all of it is gone after."""
    folder = Path(tempfile.mkdtemp(prefix="pgh"))  # short: Ray's sockets live in it
    environment = clean_environment(folder) | {MARK: uuid.uuid4().hex, "RAY_USAGE_STATS_ENABLED": "0"}
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    dashboard, gcs, client = _free_ports(3)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={gcs}", f"--temp-dir={folder}/ray"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *("--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"),
        "--dashboard-agent-listen-port=0",
    ]
    process = _started(command, folder / "head.log", environment)
    try:
        yield Head(folder, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")
    finally:
        process.terminate()
        process.wait(60)
        for left in marked(MARK, environment[MARK]):
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)
