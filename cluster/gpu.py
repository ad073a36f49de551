"""Whether this machine has an NVIDIA GPU, without importing anything slow."""

from __future__ import annotations

from pathlib import Path

DRIVER = Path("/dev/nvidiactl")


def has_gpu(driver: Path = DRIVER) -> bool:
    """Ray's GPUs may be logical; NVIDIA's driver is there or not."""
    return driver.exists()
