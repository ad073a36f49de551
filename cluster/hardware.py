"""The hardware a plan is made for: GPUs by their datasheets, this machine's CPU, and what is found here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from configs.errors import UsageError

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """One GPU, or one machine's CPU with its memory.

    memory: bytes that programs find. bf16 and fp32: dense FLOP/s with 32-bit accumulation; bf16 None where there
    is none. bandwidth: bytes/s of its memory. link: bytes/s, one way, to its neighbours. price: assumed dollars an
    hour. learner_base and rollout_base: bytes of a process that holds no model yet.
    """

    name: str
    memory: float
    bf16: float | None
    fp32: float
    bandwidth: float
    link: float
    price: float
    learner_base: float
    rollout_base: float
    is_cpu: bool = False

    def flops(self, dtype: str) -> float:
        return self.fp32 if dtype == "float32" or self.bf16 is None else self.bf16


@dataclass(frozen=True)
class Hardware:
    """So many devices of one kind."""

    count: int
    device: Device

    @property
    def name(self) -> str:
        return self.device.name if self.device.is_cpu else f"{self.count}x{self.device.name}"


def _gpu(
    name: str, mib: int, bf16: float | None, fp32: float, bandwidth: float, link: float, price: float
) -> tuple[str, Device]:
    """A row of the table: MiB as nvidia-smi shows them, TFLOP/s, GB/s, dollars."""
    return name.lower(), Device(
        name=name,
        memory=float(mib * MIB),
        bf16=None if bf16 is None else bf16 * 1e12,
        fp32=fp32 * 1e12,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
        price=price,
        # The CUDA context, the kernels of torch, cuBLAS and NCCL, their workspaces. Assumed, not measured.
        learner_base=0.8 * GIB,
        rollout_base=1.2 * GIB,
    )


# TFLOP/s and GB/s from NVIDIA's datasheets and, for GeForce, the architecture whitepapers (dense, not the doubled
# figures for sparse matrices; link: NVLink in one direction where the board has it, else PCIe). Prices are no
# datasheet's: what a GPU-hour is assumed to cost, to be replaced with --price.
GPUS = dict(
    [
        _gpu("T4", 15360, None, 8.1, 300, 16, 0.25),  # Turing has no bfloat16
        _gpu("L4", 23034, 121, 30.3, 300, 32, 0.50),
        _gpu("RTX3090", 24576, 71, 35.6, 936, 32, 0.25),
        _gpu("RTX4090", 24564, 165, 82.6, 1008, 32, 0.40),
        _gpu("A40", 46068, 149.7, 37.4, 696, 32, 0.40),
        _gpu("L40S", 46068, 362, 91.6, 864, 32, 0.90),
        _gpu("A100-40", 40960, 312, 19.5, 1555, 300, 1.20),
        _gpu("A100-80", 81920, 312, 19.5, 2039, 300, 1.60),
        _gpu("H100", 81559, 989, 67, 3350, 450, 2.50),
        _gpu("H200", 143771, 989, 67, 4800, 450, 3.50),
    ]
)

# Of 2 cores of an AMD EPYC, no GPU: what one core does in float32, what the memory gives to one core and to all,
# and what each process takes before it holds a model, Ray's part included.
CORE_FLOPS = 100e9
CORE_BANDWIDTH = 10e9
CPU_LEARNER_BASE = 560 * MIB
CPU_ROLLOUT_BASE = 690 * MIB
CPU_PRICE = 0.10


def this_cpu() -> Hardware:
    """The CPU of this machine. bfloat16 is no faster there than float32."""
    cores = len(os.sched_getaffinity(0))
    return Hardware(
        1,
        Device(
            name="cpu",
            memory=float(psutil.virtual_memory().total),
            bf16=cores * CORE_FLOPS,
            fp32=cores * CORE_FLOPS,
            bandwidth=cores * CORE_BANDWIDTH,
            link=CORE_BANDWIDTH,
            price=CPU_PRICE,
            learner_base=CPU_LEARNER_BASE,
            rollout_base=CPU_ROLLOUT_BASE,
            is_cpu=True,
        ),
    )


def parse_hardware(text: str) -> Hardware:
    """`4xA40`, `A100-80` or `cpu`. UsageError, naming what is known, for anything else."""
    if text.lower() == "cpu":
        return this_cpu()
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?([\w-]+)", text.strip(), re.IGNORECASE)
    device = find_gpu(found[2]) if found else None
    if found is None or device is None or found[1] == "0":
        names = ", ".join(gpu.name for gpu in GPUS.values())
        raise UsageError(f"--hardware {text}: expected a number and a GPU, such as 4xA40, of {names}, or cpu.")
    return Hardware(int(found[1] or 1), device)


def find_gpu(name: str, memory: float | None = None) -> Device | None:
    """The GPU that a name means: ours, nvidia-smi's or Ray's. memory, in bytes, tells one from another of its name."""
    plain = re.sub(r"nvidia|geforce|tesla", "", name.lower())
    plain = re.sub(r"[\s_]+", "-", plain.strip()).replace("rtx-", "rtx")
    if plain in GPUS:
        return GPUS[plain]
    known = [gpu for key, gpu in GPUS.items() if plain.split("-")[0] == key.split("-")[0]]
    size = re.search(r"-(\d+)gb?\b", plain)
    if memory is None and size:
        memory = float(size[1]) * GIB
    if memory is None:
        return known[0] if len(known) == 1 else None
    return min(known, key=lambda gpu: abs(gpu.memory - memory), default=None)


def hardware_here() -> Hardware:
    """What a run would find: the GPUs of the Ray cluster that RAY_ADDRESS names, else this machine's, else its CPU.

    UsageError if the GPUs there are not of one known kind.
    """
    found = _of_ray() if os.environ.get("RAY_ADDRESS") else _of_this_machine()
    if not found:
        return this_cpu()
    devices = [find_gpu(name, memory) for name, memory in found]
    first = devices[0]
    if first is None or any(device != first for device in devices):
        names = ", ".join(sorted({name for name, _ in found}))
        raise UsageError(
            f"The GPUs found here ({names}) are not of one kind that is known. Say what to plan for with "
            "`pocketgrpo plan --hardware`, such as 4xA40."
        )
    return Hardware(len(devices), first)


def _of_this_machine() -> list[tuple[str, float | None]]:
    """(name, bytes) of every GPU that nvidia-smi lists; none where there is no nvidia-smi or it finds no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        raise UsageError(
            "nvidia-smi did not answer within 20 s. Look at the driver, or say what to plan for with --hardware."
        ) from None
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    rows = [line.rpartition(",") for line in lines if "," in line]
    return [(name.strip(), float(mib) * MIB) for name, _, mib in rows]


def _of_ray() -> list[tuple[str, float | None]]:
    """The name of every GPU of the cluster; memory is not told apart there, as Ray's name says it where needed."""
    import ray

    from cluster.ray_session import ray_session

    with ray_session("auto"):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "accelerator_type:"
    found: list[tuple[str, float | None]] = []
    for resources in nodes:
        names = [name.removeprefix(kind) for name in resources if name.startswith(kind)] or [
            "of a kind Ray cannot tell"
        ]
        found += [(names[0], None)] * int(resources.get("GPU", 0))
    return found
