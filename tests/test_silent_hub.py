"""A hub that takes connections and never answers: a named error, in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import ROOT

PROGRAM = """
import sys
from cluster.train import main
import data.hub
data.hub.SILENCE_SECONDS = 1.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("setting", "said"),
    [("model.name=owner/model", "The model 'owner/model'"), ("data.dataset=owner/rows", "The dataset 'owner/rows'")],
)
def test_a_hub_that_never_answers_is_named(setting: str, said: str, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM, setting, f"training.runs_dir={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, env=kept | hub, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: {said}" in done.stderr and "Hugging Face hub" in done.stderr
