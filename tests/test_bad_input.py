"""A user's mistake ends in one paragraph with cause and fix, exit code 2, and nothing half written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray_session import dashboard_options
from cluster.train import main
from configs.errors import UsageError
from tests.small_run import ROOT, SMALL, arguments


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must be refused as the user's mistake."""
    code = main(list(argv))
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("error: ") and message.count("\n") == 1 and "Traceback" not in message
    return message


@pytest.fixture
def folder(ray_cluster: None, tmp_path: Path) -> Path:
    return tmp_path


def dataset(folder: Path, *rows: dict[str, str]) -> str:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.dataset={path}"


GOOD = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]


def test_a_model_the_hub_does_not_give(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "model.name=nobody/no-such-model", f"training.runs_dir={folder}")
    assert "nobody/no-such-model" in message


def test_prompts_that_are_all_too_long(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *arguments(folder, "x", "data.max_prompt_tokens=3"))
    assert "data.max_prompt_tokens=3" in message


def test_a_kv_cache_larger_than_the_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *arguments(folder, "x", "rollout.kv_cache_mb=9000000"))
    assert "memory are free" in message


def test_more_actors_than_cpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *arguments(folder, "x", "cluster.rollout_workers=500"))
    assert "CPU too few" in message and "cluster.rollout_workers" in message


def test_a_run_folder_that_holds_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "config.yaml").write_text("training: {steps: 1}\n")
    assert "--resume" in refused(capsys, *arguments(folder, "taken"))


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"cluster.dashboard_port={port} is taken"):
            dashboard_options(port)


def test_runs_that_start_together_get_dashboards_of_their_own() -> None:
    program = "from cluster.ray_session import ray_session\nwith ray_session('auto') as line: print(line)"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        for _ in range(2)
    ]
    lines = [process.communicate(timeout=120)[0] for process in processes]
    assert all("http://127.0.0.1:" in line for line in lines) and lines[0] != lines[1]


def test_a_refused_run_writes_no_run_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, *arguments(folder, "x", "rollout.kv_cache_mb=9000000"))
    assert not (folder / "x").exists()


def test_long_prompts_are_dropped_counted_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*GOOD, {"question": "What is " + " + ".join("1" * 30) + "?", "answer": "30"}]
    from cluster.materials import prepare
    from configs.loading import load_config

    config = load_config(SMALL, arguments(folder, "x", dataset(folder, *rows), "data.max_prompt_tokens=40")[2:])
    said: list[str] = []
    materials = prepare(config, said.append)
    assert len(materials.train) + len(materials.held_out) == 40
    assert any("1 dropped" in line for line in said)
    assert not {p.problem.id for p in materials.train} & {p.problem.id for p in materials.held_out}


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run_local.py"), "--dry-run", f"training.runs_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Nothing was started" in done.stdout
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main([f"training.runs_dir={tmp_path}", "--dry-run"]) == 2
