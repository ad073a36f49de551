"""Whole runs through Ray, vLLM and DeepSpeed: what they leave, how they resume, when they stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import cluster.start
from actors.engine import Engine, EngineOptions, Sampling
from cluster.run_folder import RunFolder
from cluster.train import main
from cluster.weight_sender_cpu import SharedMemorySender
from cluster.weight_transport import SHARED_MEMORY, WORKER_EXTENSION
from configs.errors import RunError
from configs.loading import load_config
from data.rollouts import read_groups
from tests.small_run import ROOT, arguments, metrics, start, status

KILL_DEADLINE = 120.0


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs for the whole module."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """A run of four steps that nothing disturbs."""
    assert main(arguments(folder, "undisturbed")) == 0
    return folder / "undisturbed"


def rewards_shown(run: Path) -> list[tuple[int, float]]:
    """(step, mean reward) as TensorBoard reads them."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward/mean")]


def test_a_run_leaves_its_whole_folder(undisturbed: Path) -> None:
    assert load_config(undisturbed / "config.yaml").training.name == "undisturbed"
    assert status(undisturbed)["state"] == "finished"
    lines = metrics(undisturbed)
    assert lines[0]["step"] == 0 and "eval/accuracy" in lines[0]
    assert [line["step"] for line in lines if "policy/loss" in line] == [1, 2, 3, 4]
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
    assert [step for step, _ in rewards_shown(undisturbed)] == [1, 2, 3, 4]
    assert not list(undisturbed.rglob("*.draft"))


def test_every_sync_of_a_run_agrees_to_fp32_rounding(undisturbed: Path) -> None:
    steps = [line for line in metrics(undisturbed) if "policy/loss" in line]
    assert max(line["rollout/logprob_diff"] for line in steps) < 1e-5
    assert max(line["rollout/logprob_diff_max"] for line in steps) < 1e-3


def test_rollouts_are_in_visit_order_with_seeds_versions_and_verdicts(undisturbed: Path) -> None:
    for step in (1, 3):
        groups = read_groups(undisturbed / "rollouts" / f"step_{step:06d}.parquet")
        assert [group.prompt.visit for group in groups] == list(range(4 * (step - 1), 4 * step))
        for group in groups:
            assert [completion.index for completion in group.completions] == [0, 1, 2, 3]
            assert len({completion.seed for completion in group.completions}) == 4
            assert all((completion.versions == step - 1).all() for completion in group.completions)
            assert all(verdict.outcome in ("correct", "wrong", "unparsable") for verdict in group.verdicts)


def test_bos_stands_once_and_eos_ends_a_finished_completion(undisturbed: Path) -> None:
    (tokenizer_folder,) = (undisturbed / "checkpoints").glob("step_000004")
    config = AutoModelForCausalLM.from_pretrained(tokenizer_folder).config
    for row in pq.read_table(undisturbed / "rollouts" / "step_000001.parquet").to_pylist():
        assert row["prompt_token_ids"].count(config.bos_token_id) == 1
        if row["finish_reason"] == "stop":
            assert row["token_ids"][-1] == config.eos_token_id


def test_a_checkpoint_opens_with_transformers_and_with_vllm_and_they_agree(undisturbed: Path) -> None:
    checkpoint = undisturbed / "checkpoints" / "step_000004"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = [model.config.bos_token_id, 8, 9, 10]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    engine = Engine(EngineOptions(checkpoint, "float32", 96, 8, 32, 16 << 20, SHARED_MEMORY, WORKER_EXTENSION))
    engine.add("a", 0, prompt, 0, Sampling(0.0, 8))
    finished = []
    while engine.busy:
        finished += engine.step()
    assert finished[0][1].token_ids.tolist() == expected.tolist()
    assert not list(checkpoint.rglob("*.pt")) + list(checkpoint.rglob("*.bin")) + list(checkpoint.rglob("*.pkl"))


def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(undisturbed: Path, folder: Path) -> None:
    run = folder / "killed"
    process = start(*arguments(folder, "killed", "cluster.dashboard_port=auto"))
    _wait_for(run / "checkpoints" / "step_000002" / "manifest.json", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert status(run)["state"] == "running"
    assert main(["--resume", str(run)]) == 0
    assert metrics(run) == metrics(undisturbed)
    assert rewards_shown(run) == rewards_shown(undisturbed)
    for name in ("model.safetensors", "trainer/rank_0.safetensors", "trainer/rank_0.json"):
        ours, theirs = (f / "checkpoints" / "step_000004" / name for f in (run, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes(), name
    before = load_file(run / "checkpoints" / "step_000002" / "model.safetensors")
    after = load_file(run / "checkpoints" / "step_000004" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before), "the model must have learnt something"


def test_replay_recomputes_the_same_loss_from_disk(undisturbed: Path) -> None:
    replay = "import sys; from pocketgrpo import main; sys.exit(main(['replay', sys.argv[1], '--step', '3']))"
    done = subprocess.run(
        [sys.executable, "-c", replay, str(undisturbed)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit" in done.stdout


def test_a_worker_that_loads_no_new_weights_stops_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster.start, "transport_of", lambda device, placement: "deaf")
    monkeypatch.setattr(cluster.start, "WORKER_EXTENSION", "tests.faults.UpdateSeconds")
    monkeypatch.setattr(
        cluster.start, "NcclSender", lambda call, bucket_bytes, *_: SharedMemorySender(call, bucket_bytes)
    )
    code = main(arguments(folder, "deaf", "learner.learning_rate=0.05", "rewards.weights.format=1.0"))
    assert code == 1
    assert "log-probs are not the learner's" in capsys.readouterr().err
    assert status(folder / "deaf")["state"] == "failed"


def test_two_workers_and_two_ranks_learn_what_one_of_each_learns(undisturbed: Path, folder: Path) -> None:
    more = ("cluster.rollout_workers=2", "cluster.learner_ranks=2", "learner.zero_stage=3", "training.steps=2")
    assert main(arguments(folder, "two", *more)) == 0
    ours = load_file(folder / "two" / "checkpoints" / "step_000002" / "model.safetensors")
    theirs = load_file(undisturbed / "checkpoints" / "step_000002" / "model.safetensors")
    assert metrics(folder / "two")[1]["reward/mean"] == metrics(undisturbed)[1]["reward/mean"]
    largest = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    # 8-bit states are quantised in blocks, and partitions cut the blocks elsewhere: small, not zero.
    assert largest < 5e-3, largest


def test_shuffled_rewards_are_the_same_rewards_dealt_out_anew(folder: Path, undisturbed: Path) -> None:
    from cluster.loop import shuffled

    groups = read_groups(undisturbed / "rollouts" / "step_000002.parquet")
    dealt = shuffled(groups, seed=1, step=2)
    before, after = ([v.total for g in each for v in g.verdicts] for each in (groups, dealt))
    assert sorted(before) == sorted(after) and before != after
    assert shuffled(groups, seed=1, step=2) == dealt


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + KILL_DEADLINE
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_a_failure_is_written_beside_what_was_known_before(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    folder.write_status("running", step=3, restarts=1)
    folder.write_failure(RunError("it broke"), "python run_local.py --resume it")
    found = status(folder.path)
    assert (found["state"], found["step"], found["restarts"]) == ("failed", 3, 1)
    assert (found["error"], found["resume"]) == ("RunError: it broke", "python run_local.py --resume it")
