"""Train on this machine: starts a local Ray and everything on it.

Without arguments: the quickstart, or where there is a GPU the recipe for a single one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.train import main

ON_A_GPU, ON_A_CPU = "tyagi_gsm8k_single_gpu", "quickstart"


def default_recipe(device: Path = Path("/dev/nvidiactl")) -> str:
    """The recipe for this machine, by whether NVIDIA's driver is there; nothing slow is imported to find out."""
    return ON_A_GPU if device.exists() else ON_A_CPU


if __name__ == "__main__":
    sys.exit(main(prog="python run_local.py", default_recipe=default_recipe()))
