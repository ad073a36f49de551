"""Claims about a user's own reward: found where the user keeps it, run by Ray's workers, named when it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UsageError
from configs.loading import load_config
from rewards import Case, Judgement, RewardError, check_weights, weigh

ROOT = Path(__file__).resolve().parent.parent
RIGHT = Judgement("correct", "7", True)

# A user's script, which knows nothing of where its modules are beyond what Python and Ray tell
SCRIPT = """
import numpy as np
import ray
from actors.verifier import Verifier
from actors.waiting import wait_for
from cluster.ray_session import ray_session
from configs.errors import RunError
from configs.schema import Rewards
from data.records import Completion, Group, Problem, Prompt
from rewards import check_weights

none = np.zeros(1, np.int32)
completions = tuple(Completion(i, i, none, none.astype(np.float32), none, text, "stop") for i, text in enumerate(
    ["<answer>7</answer>", "<answer>" + "so " * 75 + "7</answer>", "<answer>8</answer>"]))
group = Group(Prompt(0, Problem("id", "3 + 4", "7"), (1,)), completions)
kind = ray.remote(Verifier)

def verdicts(weights):
    check_weights(weights)
    verifier = kind.remote(Rewards(weights=weights), 32)
    try:
        return wait_for([verifier.score.remote(group)], 120, "A verifier", "x")[0].verdicts
    finally:
        ray.get(verifier.close.remote())

with ray_session("auto"):
    for verdict in verdicts({"own_reward:brief": 2.0, "here:one": 1.0}):
        print(verdict.outcome, round(verdict.rewards["own_reward:brief"], 2), round(verdict.total, 2))
    for name in ("here:fails", "here:says_nan"):
        try:
            verdicts({name: 1.0})
        except RunError as error:
            print(error)
"""
HERE = """
def one(case, judgement):
    return 1
def fails(case, judgement):
    raise KeyError("tokens")
def says_nan(case, judgement):
    return float("nan")
"""


def test_the_worked_example_runs_in_rays_workers_from_beside_the_script_and_from_the_current_folder(tmp_path):
    scripts, here = tmp_path / "scripts", tmp_path / "here"
    scripts.mkdir()
    here.mkdir()
    shutil.copy(ROOT / "docs" / "own_reward.py", scripts)
    (scripts / "train.py").write_text(SCRIPT)
    (here / "here.py").write_text(HERE)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(scripts / "train.py")],
        cwd=here,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["correct 1.0 3.0", "correct 0.48 1.96", "wrong 0.0 1.0"]
    assert "here:fails of rewards.weights raised KeyError: 'tokens'" in lines[3]
    assert "here:says_nan of rewards.weights returned nan" in lines[4] and "finite" in lines[4]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:f", "no_such_module.*cannot be imported.*PYTHONPATH"),
        ("broken_reward:f", "broken_reward.*cannot be imported.*SyntaxError"),
        ("plain_reward:g", "no function of .*plain_reward.py.*def g.*are: f"),
        ("plain_reward:NUMBER", "no function of"),
        ("plain_reward:", "is no module:function"),
        (":f", "is no module:function"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_at_the_start_with_what_to_do(folder, name, said):
    (folder / "broken_reward.py").write_text("def f(:")
    (folder / "plain_reward.py").write_text("NUMBER = 1\ndef f(case, judgement):\n    return 1.0\n")
    with pytest.raises(ValueError, match=said):
        check_weights({name: 1.0})
    check_weights({"plain_reward:f": 1.0})


@pytest.mark.parametrize("value", ["None", "'1'", "True", "float('inf')", "[1.0]", "1 / 0"])
def test_what_is_no_finite_number_stops_the_run_by_name(folder, value, request):
    name = f"reward_{len(request.node.name)}_{sum(map(ord, value))}"
    (folder / f"{name}.py").write_text(f"def f(case, judgement):\n    return {value}\n")
    with pytest.raises(RewardError, match=rf"the reward {name}:f of rewards\.weights"):
        weigh(Case("7", "7"), RIGHT, {f"{name}:f": 1.0})


def test_numbers_of_every_type_are_weighed_as_they_are(folder):
    half = "import numpy\ndef half(case, judgement):\n    return numpy.float32(0.5)\n"
    (folder / "two_rewards.py").write_text(half + "def two(case, judgement):\n    return 2\n")
    found = weigh(Case("7", "7"), RIGHT, {"two_rewards:half": 2.0, "two_rewards:two": -1.0})
    assert found.rewards == {"two_rewards:half": 0.5, "two_rewards:two": 2.0} and found.total == -1.0


def test_a_config_may_name_one():
    config = load_config(None, ["rewards.weights.own_reward:brief=0.5"])
    assert config.rewards.weights["own_reward:brief"] == 0.5
    with pytest.raises(UsageError):
        load_config(None, ["rewards.weights.own_reward:brief=much"])
