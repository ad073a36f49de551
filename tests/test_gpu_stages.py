"""benchmarks/gpu.py on a CPU, at toy sizes: its tables are right, and what is wrong is missed or said to fail."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

from benchmarks import gpu
from benchmarks.gpu_stages import smoke
from benchmarks.gpu_stages.models import LOGIT_SPREAD, SHAPES, model_config, random_model
from benchmarks.gpu_stages.part import Row, Setting, table
from benchmarks.gpu_stages.rig import Rig
from benchmarks.gpu_stages.side_by_side import on_one_gpu
from benchmarks.gpu_stages.speed import random_completions, update_flops
from cluster.hardware import parse_hardware
from cluster.model_shape import model_shape
from cluster.placement import arrange
from cluster.plan import Plan
from configs.loading import load_config
from data.tokenizer import build_tokenizer
from tests.small_run import ROOT
from tests.test_placement import seats_fit

ON_A_CPU = ("--device", "cpu", "--tiny")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where made models are kept from test to test."""
    return tmp_path_factory.mktemp("models")


def run(stage: str, out: Path, models: Path, *more: str) -> int:
    """The command's exit code."""
    return gpu.main(["--stage", stage, *ON_A_CPU, "--out", str(out), "--models", str(models), *more])


def recorded(out: Path) -> dict[str, Row]:
    """The rows of the only stage recorded there."""
    (line,) = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    assert line["hardware"]["cores"] and line["figures"]["device"] == "cpu"
    return {row["what"]: Row(**row) for row in line["figures"]["rows"]}


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "goal", "judgement"),
    [
        (Row("a", 0.95, least=0.95), "at least 0.95", "met"),
        (Row("a", 0.94, least=0.95), "at least 0.95", "missed"),
        (Row("a", 0.1, most=0.1), "at most 0.1", "met"),
        (Row("a", 0.11, most=0.1), "at most 0.1", "missed"),
        (Row("a", math.nan, most=0.1), "at most 0.1", "missed"),
        (Row("a", 1.2, least=0.85, most=1.15), "0.85 to 1.15", "missed"),
        (Row("a", "nothing", most=0.1), "at most 0.1", "not measured"),
        (Row("a", 5.0), "", ""),
    ],
)
def test_a_figure_is_held_against_its_goal(row: Row, goal: str, judgement: str) -> None:
    assert (row.goal, row.judgement) == (goal, judgement)
    assert table([row]).splitlines()[-1] == f"| a | {row.measured} | {goal} | {judgement} |"


def test_goals_for_a_gpu_are_none_elsewhere() -> None:
    assert Setting("cuda", False, Path()).goal(least=40.0) == {"least": 40.0, "most": None}
    assert Setting("cuda", True, Path()).goal(least=40.0) == {"least": None, "most": None}
    assert Setting("cpu", False, Path()).goal(least=40.0) == {"least": None, "most": None}


# -- what figures are made of ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_that_transformers_counts(name: str) -> None:
    config = model_config(SHAPES[name], "bfloat16")
    with torch.device("meta"):
        model = (Qwen2ForCausalLM if config.model_type == "qwen2" else LlamaForCausalLM)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPES[name].parameters


def test_random_models_spread_their_logits_and_neither_end_nor_repeat(models: Path) -> None:
    folder = random_model(Setting("cpu", True, models), "tiny", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(8, 128)[None]).logits[0]
    probabilities = logits.softmax(-1)
    assert 0.7 * LOGIT_SPREAD < logits.std() < 1.4 * LOGIT_SPREAD
    assert probabilities[:, build_tokenizer().eos_token_id].max() < 0.05
    assert probabilities.diagonal(offset=8).mean() < 0.02  # of the token that is read


def test_the_flops_of_an_update_are_three_times_those_torch_counts_forward() -> None:
    """torch counts attention whole, the update's figure a causal half of it; and torch's heads see every token."""
    shape = SHAPES["tiny"]
    (completion, *_) = random_completions(128, 64, shape.vocabulary)
    config = model_config(shape, "float32")
    config._attn_implementation = "eager"
    model, length = Qwen2ForCausalLM(config), completion.length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    half_of_attention = 2 * shape.layers * shape.query_width * length**2
    prompt_heads = 2 * shape.embedding_parameters * len(completion.prompt_ids)
    rotary = counter.get_total_flops() - (update_flops(shape, [completion]) / 3 + half_of_attention + prompt_heads)
    assert 0 <= rotary <= 2 * length * shape.head_width  # the positions' angles are a product, too


def test_random_completions_are_as_long_as_asked() -> None:
    completions = random_completions(4096, 65536, 151936)
    assert max(c.length for c in completions) <= 4096
    assert 65536 <= sum(c.length for c in completions) < 65536 + 4096


def test_both_sides_sit_on_one_gpu() -> None:
    config = load_config(None, ["cluster.placement=disaggregated", "rewards.verifiers=2"])
    shared = on_one_gpu(arrange(config, gpus=0, cores=8))
    seats_fit(shared)
    assert sum(bundle.get("GPU", 0) for bundle in shared.bundles) == 1
    assert [seat.gpus for seat in (*shared.ranks, *shared.rollouts, *shared.verifiers)] == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("recipe", ["open_rs1", "open_rs2", "open_rs3"])
def test_the_projections_in_the_docs_are_the_plans(recipe: str) -> None:
    config = load_config(recipe)
    times = Plan(config, model_shape(config.model), parse_hardware("4xA40")).times
    seconds = [f"{value:.3g}" for value in (times.sample, times.update, times.sync, times.step)]
    hours = f"{config.training.steps * times.step / 3600:.1f}"
    assert f"| {recipe} | {' | '.join(seconds)} | {hours} |" in (ROOT / "docs" / "gpu.md").read_text()


# -- the command ----------------------------------------------------------------------------------


def test_without_a_gpu_it_refuses_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert gpu.main(["--stage", "smoke", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == gpu.NO_GPU + "\n"
    assert not (tmp_path / "out").exists()


def test_the_stages_together_take_25_minutes_and_name_their_parts_once() -> None:
    assert sum(gpu.SECONDS.values()) <= 25 * 60
    for tiny in (False, True):
        for stage in gpu.SECONDS:
            names = [part.name for part in gpu.parts_of(stage, Setting("cuda", tiny, Path()))]
            assert names and len(set(names)) == len(names)


def test_a_part_that_is_none_is_refused(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("speed", tmp_path, models, "--only", "learner") == 2
    assert "learner is none of speed's parts: learner-tiny, worker-tiny" in capsys.readouterr().err


def test_what_takes_too_long_is_ended_and_said_and_the_rest_is_not_begun(tmp_path: Path, models: Path) -> None:
    assert run("smoke", tmp_path, models, "--seconds", "0.5") == 1
    rows = recorded(tmp_path)
    assert str(rows["smoke environment"].value).startswith("failed: not done after 0 s; see ")
    assert rows["smoke bfloat16"].value == "not run: the stage's time was over"


def test_what_was_measured_before_it_took_too_long_is_kept(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process in a part's place, which gives a row and hangs. Its arguments: -m benchmarks.gpu ... --here FILE."""
    slow = tmp_path / "slow"
    slow.write_text(f"""#!/bin/sh
while [ "$1" != --here ]; do shift; done
echo '{json.dumps(asdict(Row("the first run", 3.0, "s")))}' > "$2"
sleep 60
""")
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))
    assert run("regimes", tmp_path, models, "--only", "dash", "--seconds", "3") == 1
    rows = recorded(tmp_path)
    assert rows["the first run"].measured == "3 s"
    assert str(rows["regimes dash"].value).startswith("failed: not done after 3 s; see ")


def test_a_part_that_fails_costs_no_other(tmp_path: Path) -> None:
    """The folder for models cannot be made, so the learner has none; the environment needs none."""
    (tmp_path / "models").write_text("a file")
    assert run("smoke", tmp_path, tmp_path / "models", "--only", "environment", "float32") == 1
    rows = recorded(tmp_path)
    assert "NotADirectoryError" in str(rows["smoke float32"].value)
    assert str(rows["vllm"].value).startswith("0.")


@pytest.mark.usefixtures("ray_cluster")
def test_sampler_and_learner_agree_in_float32(models: Path) -> None:
    rows = smoke.agreement(Setting("cpu", True, models), "float32")
    assert [row.judgement for row in rows] == ["met"] * 4, table(rows)


@pytest.mark.usefixtures("ray_cluster")
def test_weights_that_do_not_arrive_miss_the_goal(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rig, "push", lambda self: {})
    rows = smoke.agreement(Setting("cpu", True, models), "float32")
    assert [row.judgement for row in rows] == ["met", "missed", "missed", "met"], table(rows)


def test_the_learner_is_timed_and_no_mfu_is_made_up_on_a_cpu(tmp_path: Path, models: Path) -> None:
    assert run("speed", tmp_path, models, "--only", "learner-tiny") == 0
    rows = recorded(tmp_path)
    assert float(rows["learner tiny"].value) > 0
    assert rows["learner tiny: MFU"].value == "says nothing on a CPU"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", gpu.SECONDS)
def test_every_stage_runs_whole_at_toy_sizes(stage: str, tmp_path: Path, models: Path) -> None:
    assert run(stage, tmp_path, models, "--seconds", "850") == 0
    rows = recorded(tmp_path)
    missed = [row for row in rows.values() if row.judgement == "missed"]
    assert not missed, table(missed)
