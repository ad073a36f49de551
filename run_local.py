"""Train on this machine: starts a local Ray and everything on it.

Without arguments: the quickstart, or where there is a GPU the recipe for a single one.
"""

from __future__ import annotations

import sys

from cluster.gpu import has_gpu
from cluster.interrupts import stop_when_told
from cluster.terminal import escape_crashes
from cluster.train import main

if __name__ == "__main__":
    escape_crashes()
    stop_when_told()
    recipe = "tyagi_gsm8k_single_gpu" if has_gpu() else "quickstart"
    sys.exit(main(prog="python run_local.py", default_recipe=recipe))
