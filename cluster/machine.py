"""What a node of the cluster offers a run beyond Ray's resources, and what is wrong with it.

`look` gathers the facts on the machine it runs on; every check is a function of them alone.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.version import Version

from cluster.versions import installed_versions, untested_versions

MIB = 2**20
SHARED_MEMORY = "/dev/shm"
MIN_OPEN_FILES = 4096  # an engine, its libraries and Ray's sockets; Ray asks for more only on large clusters
NVIDIA_SMI_SECONDS = 30.0
# First driver that runs a CUDA of this major version (NVIDIA's table of minor-version compatibility)
MIN_DRIVERS = {12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True)
class Machine:
    """A node's facts. shared_memory, shared_memory_free: bytes; open_files: the soft limit of a process.

    driver: of NVIDIA, None without one; cuda: what torch was built for; cut_off: pairs of GPUs that cannot
    read each other's memory.
    """

    name: str
    shared_memory: int
    shared_memory_free: int
    open_files: int
    versions: Mapping[str, str] = field(default_factory=dict)
    driver: str | None = None
    cuda: str | None = None
    cut_off: tuple[tuple[str, str], ...] = ()


def look() -> Machine:
    """The facts of the machine this runs on."""
    shared = os.statvfs(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") if _has_gpus() else None
    return Machine(
        name=socket.gethostname(),
        shared_memory=shared.f_blocks * shared.f_frsize if shared else 0,
        shared_memory_free=shared.f_bavail * shared.f_frsize if shared else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        versions=installed_versions(),
        driver=driver.split("\n")[0].strip() if driver else None,
        cuda=_torch_cuda() if driver else None,
        cut_off=cut_off_pairs(_nvidia_smi("topo", "-p2p", "r")) if driver else (),
    )


def small_shared_memory(machine: Machine, bucket_bytes: int) -> str | None:
    """An error: a bucket of the weight sync is a segment of shared memory, and writing to one too large kills."""
    if machine.shared_memory_free >= bucket_bytes:
        return None
    return (
        f"{SHARED_MEMORY} has {machine.shared_memory_free / MIB:.0f} MiB free and a bucket of the weight sync takes "
        f"{bucket_bytes / MIB:.0f}: lower cluster.sync_bucket_mb, or enlarge it (Docker: --shm-size=8g; Kubernetes: "
        f"an emptyDir with medium Memory at {SHARED_MEMORY})"
    )


def object_store_on_disk(machine: Machine, bucket_bytes: int, store_bytes: int) -> str | None:
    """A warning: where shared memory is too small for it, Ray keeps its object store in /tmp."""
    if machine.shared_memory >= bucket_bytes + store_bytes:
        return None
    return (
        f"{SHARED_MEMORY} holds {machine.shared_memory / MIB:.0f} MiB, less than Ray's object store of "
        f"{store_bytes / MIB:.0f} MiB and a sync bucket of {bucket_bytes / MIB:.0f} MiB, so batches may go over disk: "
        "enlarge it (Docker: --shm-size=8g), or start Ray with a smaller --object-store-memory"
    )


def few_open_files(machine: Machine) -> str | None:
    """A warning."""
    if machine.open_files >= MIN_OPEN_FILES or machine.open_files == resource.RLIM_INFINITY:
        return None
    return (
        f"a process may open only {machine.open_files} files, and Ray with vLLM needs up to {MIN_OPEN_FILES}: "
        "`ulimit -n 65536` before `ray start`"
    )


def old_driver(machine: Machine) -> str | None:
    """An error."""
    needed = MIN_DRIVERS.get(int(machine.cuda.split(".")[0])) if machine.cuda else None
    if needed is None or machine.driver is None or Version(machine.driver) >= Version(needed):
        return None
    return (
        f"the NVIDIA driver {machine.driver} cannot run torch's CUDA {machine.cuda}, which needs at least {needed}: "
        "update the driver, or install a torch built for an older CUDA"
    )


def no_peer_access(machine: Machine) -> str | None:
    """A warning: NCCL then copies through the host's memory."""
    if not machine.cut_off:
        return None
    pairs = ", ".join("-".join(pair) for pair in machine.cut_off)
    return (
        f"these GPUs cannot read each other's memory: {pairs}. NCCL goes through {SHARED_MEMORY} instead, which is "
        "slower; look for PCIe ACS (`nvidia-smi topo -p2p r`), or choose GPUs under one switch"
    )


def untested_libraries(machine: Machine) -> str | None:
    """A warning."""
    return untested_versions(machine.versions)


def cut_off_pairs(table: str | None) -> tuple[tuple[str, str], ...]:
    """The pairs of GPUs without peer access in what `nvidia-smi topo -p2p r` prints."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in (table or "").splitlines()]
    names = next((row for row in rows if row and all(re.fullmatch(r"GPU\d+", cell) for cell in row)), [])
    found = []
    for row in rows:
        if row and row[0] in names and len(row) == len(names) + 1:
            cells = zip(names, row[1:], strict=True)
            found += [(row[0], other) for other, cell in cells if cell not in ("X", "OK") and row[0] < other]
    return tuple(found)


def _has_gpus() -> bool:
    return shutil.which("nvidia-smi") is not None


def _nvidia_smi(*arguments: str) -> str | None:
    """What it prints; None where it fails, as it does without a driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda
