"""LoRA: adapters alone are trained, vLLM samples with just what they make of the base, and a run goes on exactly."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from actors.engine import Sampling
from cluster.train import main
from configs.errors import UsageError
from configs.loading import load_config
from learner.batching import Sequence
from learner.lora import FOLDER, TENSORS_FILE, add_adapters, base_weights
from tests.learner_cases import TEMPERATURE, Batch, Case, tiny_models
from tests.lora_process import run, write_sequences
from tests.small_run import SMALL, arguments, metrics
from tests.test_weight_sync import Rig
from tests.tiny import MAX_COMPLETION, MAX_PROMPT, VOCABULARY, open_plain, plain_logprobs

RANK, ALPHA = 4, 8.0
FP32_MEAN, FP32_MAX = 1e-5, 1e-4
FAST = (("learning_rate", 1e-2),)  # at which three updates of tiny adapters show in the log-probs
# Merged weights that are synced, and the fault planted in them.
FAULTY_MERGES = {"incomplete": "one adapter is not merged", "unscaled": "adapters are merged unscaled"}
MERGES = {"weights": None, **FAULTY_MERGES}

LEARNT = [Case(2, tied=True, use="learnt", learner=FAST), Case(3, use="learnt", checkpointing=True, learner=FAST)]
SAVES = [
    Case(0, use="save", learner=FAST),
    Case(0, use="save", dtype="bfloat16", optimizer="adamw_8bit", learner=FAST),
    Case(1, use="save", dtype="bfloat16", tied=True, learner=FAST),
    Case(2, use="save", optimizer="adamw_8bit", learner=FAST),
    Case(2, use="save", dtype="bfloat16", checkpointing=True, learner=FAST),
    Case(3, use="save", tied=True, learner=FAST),
    Case(3, use="save", dtype="bfloat16", optimizer="adamw_8bit", checkpointing=True, learner=FAST),
]
TWO_RANKS = Case(3, ranks=2, use="save", dtype="bfloat16", checkpointing=True, learner=FAST)
NOT_LOADED, IN_PLACE = SAVES[3], Case(0, use="in_place", learner=FAST)


def job(case: Case, models: dict[str, Path], actions: list[list[Any]], **more: Any) -> dict[str, Any]:
    """A job of `lora_process`; an action may leave out that no fault is planted."""
    config = case.config()
    config["model"] |= {"lora_rank": RANK, "lora_alpha": ALPHA}
    described = {"name": case.name, "config": config, "base": str(models[case.model]), "resume": None, "fault": None}
    return described | {"actions": [[*action, None][:3] for action in actions]} | more


def update(seed: int) -> list[Any]:
    return ["update", asdict(Batch(seed=seed))]


@dataclass(frozen=True)
class Outcomes:
    """Where everything lies, and what every action answered."""

    folder: Path
    models: dict[str, Path]
    answers: dict[str, list[Any]]

    def tensors(self, case: Case, what: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{case.name}-{what}.safetensors")

    def checkpoint(self, case: Case) -> Path:
        return self.folder / f"{case.name}-saved"

    def base(self, case: Case) -> dict[str, Tensor]:
        """The model that the case began with, in its type."""
        dtype = getattr(torch, case.dtype)
        return {n: t.to(dtype) for n, t in load_file(self.models[case.model] / "model.safetensors").items()}


@pytest.fixture(scope="module")
def outcomes(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """All ranks, in one process and a pair of them, while vLLM samples here what the first ones sync."""
    folder = tmp_path_factory.mktemp("lora")
    models = tiny_models(folder / "models")
    alone = [learnt_job(case, models, folder) for case in LEARNT]
    alone += [job for case in SAVES for job in saved_and_resumed_jobs(case, models, folder)]
    alone += [*faulty_jobs(models, folder), *[synced_job(case, models, folder) for case in LEARNT]]
    alone[-1]["actions"].append(["replay", str(adapted), None])  # the last, as it closes the process group
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(run, folder / "alone", alone, 1)
        beside = pool.submit(run, folder / "pair", saved_and_resumed_jobs(TWO_RANKS, models, folder), 2)
        for case in LEARNT:
            rig = Rig(models[case.model], models[case.model], bucket_bytes=40_000)
            for merge in MERGES:
                weights = folder / f"{case.name}-{merge}.safetensors"
                while not weights.exists() and not answers.done():
                    time.sleep(0.05)
                write_sequences(folder / f"{case.name}-{merge}.json", sampled(rig, load_file(weights)))
        return Outcomes(folder, models, answers.result() | beside.result())


def learnt_job(case: Case, models: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Learns from three batches and merges, rightly and wrongly."""
    actions: list[list[Any]] = [["reference", None], *map(update, range(3)), ["reference", None]]
    actions += [["reference", None, "adapters are not disabled"]]
    actions += [["logprobs", str(folder / f"{case.name}-logprobs.safetensors")]]
    actions += [["weights", str(folder / f"{case.name}-{m}.safetensors"), fault] for m, fault in MERGES.items()]
    actions += [["base", str(folder / f"{case.name}-base.safetensors")], ["save", str(folder / f"{case.name}-saved")]]
    return job(case, models, actions)


def synced_job(case: Case, models: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Resumes and learns from what vLLM has sampled after each sync; the wrong ones first, as they make no step."""
    actions = [["on-policy update", str(folder / f"{case.name}-{merge}.json")] for merge in (*FAULTY_MERGES, "weights")]
    return job(case, models, actions, name=f"{case.name}-synced", resume=str(folder / f"{case.name}-saved"))


def saved_and_resumed_jobs(case: Case, models: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """A rank that saves and goes on, and a fresh one that goes on from what was saved."""

    def tensors(what: str) -> list[Any]:
        return [what, str(folder / f"{case.name}-{what}.safetensors")]

    saved = str(folder / f"{case.name}-saved")
    resumed = ["weights", str(folder / f"{case.name}-resumed.safetensors")]
    return [
        job(case, models, [update(0), update(1), ["late save", saved], update(2), tensors("weights"), tensors("base")]),
        job(case, models, [update(2), resumed], name=f"{case.name}-resumed", resume=saved),
    ]


def faulty_jobs(models: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    resumed = {"name": NOT_LOADED.name + "-faulty", "resume": str(folder / f"{NOT_LOADED.name}-saved")}
    goes_on = [update(2), ["weights", str(folder / f"{NOT_LOADED.name}-faulty.safetensors")]]
    merged = ["weights", str(folder / f"{IN_PLACE.name}-weights.safetensors"), "adapters are merged in place"]
    base = ["base", str(folder / f"{IN_PLACE.name}-base.safetensors")]
    return [
        job(NOT_LOADED, models, goes_on, fault="adapters are not loaded", **resumed),
        job(IN_PLACE, models, [update(0), merged, base]),
    ]


def sampled(rig: Rig, weights: dict[str, Tensor]) -> list[Sequence]:
    """What vLLM samples after a sync of these weights."""
    rig.send(weights)
    prompt = [2, *range(8, 7 + MAX_PROMPT)]
    completions = rig.sample(prompt, Sampling(TEMPERATURE, MAX_COMPLETION), count=16)
    return [
        Sequence(np.array(prompt), c.token_ids, c.logprobs, advantage)
        for c, advantage in zip(completions, np.linspace(-1, 1, 16).tolist(), strict=True)
    ]


def ids(cases: Iterable[Case]) -> list[str]:
    return [case.name for case in cases]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# -- merging --------------------------------------------------------------------------------------


def llama(folder: Path) -> Any:
    return open_plain(tiny_models(folder)["tied"])


def gpt2(folder: Path) -> Any:
    """Its linear layers keep their weights the other way round."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_that_peft_merges_and_merging_changes_none(
    make: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make(tmp_path).to(dtype)
    adapters = add_adapters(model, RANK, ALPHA, seed=0, base=tmp_path)
    with torch.no_grad():
        for part in adapters.named_parameters().values():
            part.add_(0.1 * torch.randn_like(part))
    before = copy.deepcopy(model.state_dict())
    merged = {name: adapters.merged(name, p.detach(), adapters.parts(name)) for name, p in base_weights(model).items()}
    assert same(before, model.state_dict())
    model.float()  # as peft would round twice
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    for layer in layers:
        layer.merge()
    assert same(merged, {name: p.detach().to(dtype) for name, p in base_weights(model).items()})
    assert len(adapters) == len(layers) > 6
    assert not any("lm_head" in name for name in adapters.named_parameters())


# -- the sync -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LEARNT, ids=ids(LEARNT))
def test_after_a_sync_vllm_samples_with_the_learners_log_probs(case: Case, outcomes: Outcomes) -> None:
    right = outcomes.answers[f"{case.name}-synced"][2]
    assert right["rollout/logprob_diff"] < FP32_MEAN and right["rollout/logprob_diff_max"] < FP32_MAX
    assert outcomes.answers[case.name][4]["policy"] > 0.1, "the adapters must have learnt something"


@pytest.mark.parametrize("case", LEARNT, ids=ids(LEARNT))
def test_a_wrong_merge_stops_the_run(case: Case, outcomes: Outcomes) -> None:
    incomplete, unscaled, *_ = outcomes.answers[f"{case.name}-synced"]
    assert "log-probs are not the learner's" in incomplete["error"]
    assert "log-probs are not the learner's" in unscaled["error"]


# -- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LEARNT, ids=ids(LEARNT))
def test_the_reference_is_the_base_bit_for_bit_before_and_after_updates(case: Case, outcomes: Outcomes) -> None:
    before, *updates, after, faulty = outcomes.answers[case.name][:6]
    assert before == {"reference": 0.0, "policy": 0.0}
    assert after["reference"] == 0.0 and after["policy"] > 0.1
    assert faulty["reference"] > 0.1, "adapters that stay enabled must be seen"
    kl = [metrics["policy/kl"] for metrics in updates]
    assert kl[0] == 0.0 and 0.0 < kl[1] < kl[2]


# -- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*LEARNT, *SAVES, TWO_RANKS], ids=lambda case: case.name)
def test_the_base_never_changes(case: Case, outcomes: Outcomes) -> None:
    assert same(outcomes.tensors(case, "base"), outcomes.base(case))


def test_merging_in_place_is_seen(outcomes: Outcomes) -> None:
    assert not same(outcomes.tensors(IN_PLACE, "base"), outcomes.base(IN_PLACE))


@pytest.mark.parametrize("case", [*LEARNT, *SAVES], ids=lambda case: case.name)
def test_the_optimizer_knows_adapters_only(case: Case, outcomes: Outcomes) -> None:
    state = load_file(outcomes.checkpoint(case) / "trainer" / "rank_0.safetensors")
    masters = {name: tensor for name, tensor in state.items() if name.startswith("master.")}
    adapters = load_file(outcomes.checkpoint(case) / FOLDER / TENSORS_FILE).values()
    assert sum(t.numel() for t in masters.values()) == sum(t.numel() for t in adapters) > 0
    assert {name.split(".")[1] for name in state} == {name.split(".")[1] for name in masters}
    assert all(t.any() for t in adapters), "every A and B must have been trained"


# -- save and resume ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*SAVES, TWO_RANKS], ids=lambda case: case.name)
def test_a_resumed_rank_goes_on_bit_for_bit(case: Case, outcomes: Outcomes) -> None:
    assert outcomes.answers[case.name][3] == outcomes.answers[f"{case.name}-resumed"][0]
    left_alone = outcomes.tensors(case, "weights")
    assert same(left_alone, outcomes.tensors(case, "resumed"))
    assert not same(left_alone, load_file(outcomes.checkpoint(case) / "model.safetensors")), "it must go on indeed"


def test_adapters_that_are_not_loaded_are_seen(outcomes: Outcomes) -> None:
    name = NOT_LOADED.name
    assert outcomes.answers[name][3] != outcomes.answers[f"{name}-faulty"][0]
    assert not same(outcomes.tensors(NOT_LOADED, "weights"), outcomes.tensors(NOT_LOADED, "faulty"))


@pytest.mark.parametrize("case", LEARNT, ids=ids(LEARNT))
def test_a_checkpoint_opens_with_transformers_and_with_peft_on_the_base(case: Case, outcomes: Outcomes) -> None:
    from peft import PeftModel

    checkpoint, expected = outcomes.checkpoint(case), outcomes.tensors(case, "logprobs")
    base = outcomes.models[case.model]
    for model in (open_plain(checkpoint), PeftModel.from_pretrained(open_plain(base), checkpoint / FOLDER)):
        with torch.no_grad():
            for index, sequence in enumerate(Batch().sequences(base)):
                difference = (plain_logprobs(model, sequence, TEMPERATURE) - expected[str(index)]).abs()
                assert difference.max() < FP32_MAX and difference.mean() < FP32_MEAN
    assert same(dict(open_plain(checkpoint).named_parameters()), outcomes.tensors(case, "weights"))
    assert json.loads((checkpoint / FOLDER / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_adapters_are_drawn_from_the_seed_alone(tmp_path: Path) -> None:
    drawn: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(drawn))  # whatever was drawn before, on whichever rank
        adapters = add_adapters(gpt2(tmp_path), RANK, ALPHA, seed, base=tmp_path)
        drawn.append({name: part.detach() for name, part in adapters.named_parameters().items()})
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])


def test_adapters_of_another_rank_are_refused(tmp_path: Path) -> None:
    small, large = (add_adapters(gpt2(tmp_path), rank, ALPHA, seed=0, base=tmp_path) for rank in (2, 4))
    small.write(tmp_path / FOLDER, {name: part.detach() for name, part in small.named_parameters().items()})
    small.load(tmp_path / FOLDER)
    with pytest.raises(ValueError, match=r"not those of this model with this model\.lora_rank"):
        large.load(tmp_path / FOLDER)


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.lora_rank=4", "learner.reference_reset=interval", "learner.kl_coefficient=1e-4"),
            "learner.reference_reset=interval cannot reset the reference of model.lora_rank=4",
        ),
        (("model.lora_alpha=16",), "model.lora_alpha=16 would have no effect, as model.lora_rank=0"),
    ],
)
def test_options_that_contradict_adapters_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(SMALL, overrides)
    assert message in str(caught.value)


# -- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps with adapters and a KL."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("model.lora_rank=8", "learner.kl_coefficient=0.01", "learner.learning_rate=0.01", "learner.zero_stage=3")
    assert main(arguments(folder, "adapted", *options, "training.steps=3", "checkpoint.every=2")) == 0
    return folder / "adapted"


def test_every_sync_of_a_run_agrees_to_fp32_rounding(adapted: Path) -> None:
    steps = [line for line in metrics(adapted) if "policy/loss" in line]
    assert max(line["rollout/logprob_diff"] for line in steps) < FP32_MEAN
    assert steps[0]["policy/kl"] == 0.0 < steps[2]["policy/kl"]


def test_a_run_resumed_with_adapters_is_bit_for_bit_the_undisturbed_one(adapted: Path, tmp_path: Path) -> None:
    resumed = Path(shutil.copytree(adapted, tmp_path / "resumed"))
    last = "checkpoints/step_000003"
    shutil.rmtree(resumed / last)
    assert main(["--resume", str(resumed)]) == 0
    assert metrics(resumed) == metrics(adapted)
    for name in ("model.safetensors", f"{FOLDER}/{TENSORS_FILE}", "trainer/rank_0.safetensors"):
        assert (resumed / last / name).read_bytes() == (adapted / last / name).read_bytes(), name


def test_replay_with_adapters_recomputes_the_same_loss(outcomes: Outcomes) -> None:
    recorded, recomputed = outcomes.answers[f"{LEARNT[-1].name}-synced"][-1]
    assert recorded == recomputed
