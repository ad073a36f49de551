"""Train on this machine: starts a local Ray and everything on it. Without arguments: the quickstart."""

from __future__ import annotations

import sys

from cluster.train import main

if __name__ == "__main__":
    sys.exit(main(prog="python run_local.py"))
