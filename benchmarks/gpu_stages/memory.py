"""The most memory that what runs meanwhile takes, beside what the plan says."""

from __future__ import annotations

import os
import threading
from types import TracebackType

import torch

from actors.engine import Device
from benchmarks.gpu_stages.part import Row, Setting
from benchmarks.plan import POLL_SECONDS, note_peaks
from cluster.hardware import GIB, hardware_here, this_cpu
from cluster.model_shape import model_shape
from cluster.plan import Plan
from configs.schema import Config


class PeakMemory:
    """Bytes at the peak while the block runs: `of` the GPU, beyond what was in use before, or on a CPU of each kind
    of actor below this process."""

    def __init__(self, device: Device) -> None:
        self.of: dict[str, float] = {}
        self._device = device
        self._before = used_gpu_memory() if device == "cuda" else 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(60.0)

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            if self._device == "cuda":
                used = used_gpu_memory() - self._before
                self.of["shared GPU"] = max(self.of.get("shared GPU", 0.0), used)
            else:
                note_peaks(os.getpid(), self.of)


def used_gpu_memory() -> float:
    """Bytes in use on the first GPU, whoever uses them; this process has a context there from then on."""
    free, total = torch.cuda.mem_get_info()
    return float(total - free)


def beside_plan(setting: Setting, config: Config, peak: PeakMemory, name: str) -> list[Row]:
    """Peaks of a run of this config, and planned / measured. RuntimeError if nothing was seen of a process."""
    plan = plan_here(setting, config)
    planned = {"learner": plan.learner.peak, "rollout": plan.rollout.peak}
    if setting.device == "cuda":
        planned = {seat.name: seat.peak for seat in plan.seats}
    if set(planned) != set(peak.of):
        raise RuntimeError(f"memory was planned of {sorted(planned)} and seen of {sorted(peak.of)}")
    rows = []
    for who, size in planned.items():
        rows.append(Row(f"{name}: peak memory of the {who}", peak.of[who] / GIB, "GiB"))
        ratio = size / peak.of[who]
        rows.append(Row(f"{name}: planned / measured, {who}", ratio, **setting.goal(least=1 / 1.15, most=1.15)))
    return rows


def plan_here(setting: Setting, config: Config) -> Plan:
    """The plan of a config for the device of this setting."""
    hardware = this_cpu() if setting.device == "cpu" else hardware_here()
    return Plan(config, model_shape(config.model), hardware)
