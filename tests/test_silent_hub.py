"""A hub that takes connections and never answers: a named error, in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.small_run import ROOT

PROGRAM = """
import sys
from cluster.train import main
import data.hub
data.hub.SILENCE_SECONDS = 1.0
sys.exit(main(sys.argv[1:]))
"""


pytestmark = pytest.mark.faults
CASES = {"model.name=owner/model": "The model 'owner/model'", "data.dataset=owner/rows": "The dataset 'owner/rows'"}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """What each command, run beside the other, ends with: exit code, output, errors."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        programs = {}
        for setting in CASES:
            folder = tmp_path_factory.mktemp("hub")
            kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
            hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(folder)}
            settings = (setting, f"training.runs_dir={folder}", "cluster.dashboard_port=off")
            command = [sys.executable, "-c", PROGRAM, *settings]
            pipe = subprocess.PIPE
            programs[setting] = subprocess.Popen(command, cwd=ROOT, env=kept | hub, stdout=pipe, stderr=pipe, text=True)
        said = {setting: program.communicate(timeout=120) for setting, program in programs.items()}
    return {setting: (programs[setting].returncode, *said[setting]) for setting in CASES}


@pytest.mark.parametrize("setting", CASES)
def test_a_hub_that_never_answers_is_named(setting: str, refused: dict[str, tuple[int, str, str]]) -> None:
    code, output, errors = refused[setting]
    assert code == 2, output + errors
    assert f"error: {CASES[setting]}" in errors and "Hugging Face hub" in errors
