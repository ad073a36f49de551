"""The smallest whole run: its command line, and what of its result must be the same when run again."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tests" / "small.yaml"
# Warm-started once a test session, in processes of this one too.
CACHE = Path(os.environ.setdefault("POCKETGRPO_TEST_CACHE", tempfile.mkdtemp(prefix="pocketgrpo-cache-")))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    """The command line of a small run in `folder`."""
    place = (f"training.runs_dir={folder}", f"model.cache_dir={CACHE}", f"training.name={name}")
    return ["--config", str(SMALL), *place, *more]


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """`python run_local.py` as a user starts it, with more variables in its environment, output to be read."""
    command = [sys.executable, "-u", str(ROOT / "run_local.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "tokens/per_second")
    return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())
