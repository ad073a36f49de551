"""Score a model on benchmarks, on this machine: see --help."""

from __future__ import annotations

import sys

from cluster.evaluate import main
from cluster.interrupts import stop_when_told
from cluster.terminal import escape_crashes

if __name__ == "__main__":
    escape_crashes()
    stop_when_told()
    sys.exit(main(prog="python evaluate.py"))
