"""Supervised fine-tuning: the same learner, data and logging as RL, with demonstrations in the place of completions."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from benchmarks.learning_curve import draw
from cluster import replay
from cluster.materials import Materials, prepare
from cluster.progress import Display
from cluster.supervised import imitate, sequence_of
from cluster.train import main
from configs.errors import UsageError
from configs.loading import load_config
from configs.schema import Config
from data.records import Problem, Prompt
from data.sampler import PromptSampler
from learner.alarms import Limits
from learner.batching import Sequence
from tests.small_run import CACHE, SMALL, metrics, status
from tests.tiny import open_plain

SFT = "learner.objective=sft"
MINE = ("data.dataset=mine.jsonl", SFT)
IGNORED = -100  # transformers' label of a token without loss


def sft_recipe(folder: Path) -> Path:
    """The small recipe as SFT; like an RL recipe it may name a temperature, which then no loss may know."""
    path = folder / "sft.yaml"
    text = SMALL.read_text().replace("learner: {learning_rate: 1e-3", "learner: {objective: sft, learning_rate: 3e-4")
    path.write_text(text.replace("rollout: {", "rollout: {temperature: 0.5, top_k: 5, "))
    return path


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supervised run of four steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("runs")
    place = (f"training.runs_dir={folder}", f"model.cache_dir={CACHE}", "training.name=sft", "evaluation.every=2")
    assert main(["--config", str(sft_recipe(folder)), *place]) == 0
    return folder / "sft"


@pytest.fixture(scope="module")
def config(run: Path) -> Config:
    return load_config(run / "config.yaml")


@pytest.fixture(scope="module")
def materials(config: Config) -> Materials:
    return prepare(config, lambda _: None)


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics(folder) if "policy/loss" in line]


# -- a whole run ----------------------------------------------------------------------------------


def test_a_supervised_run_leaves_the_folder_of_an_rl_run_without_rollouts(run: Path) -> None:
    assert status(run)["state"] == "finished" and status(run)["step"] == 4
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "status.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert [line["step"] for line in metrics(run) if "eval/accuracy" in line] == [0, 2, 4]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("policy/loss")] == [1, 2, 3, 4]


def test_its_metrics_are_those_of_rl_that_mean_the_same_and_no_others(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, line in enumerate((line for line in lines if "policy/loss" in line), start=1):
        assert set(line) == {
            *("step", "policy/loss", "policy/entropy", "policy/grad_norm", "policy/learning_rate", "policy/updates"),
            *("policy/version", "tokens/trained", "tokens/per_second", "time/update", "time/sync", "time/step"),
            *("time/sync_gather", "time/sync_copy", "time/sync_load", "time/sync_repack", "time/checkpoint_wait"),
        }
        assert line["policy/version"] == line["step"] == step


def plain_loss(model: torch.nn.Module, prompts: list[Prompt], with_prompts: bool = False) -> float:
    """transformers' own loss of each prompt and demonstration, as the mean over all tokens that carry any."""
    total, tokens = 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([[*prompt.token_ids, *prompt.demonstration_ids]])
        labels = ids.clone()
        labels[0, : 1 if with_prompts else len(prompt.token_ids)] = IGNORED
        count = int((labels != IGNORED).sum())
        total += float(model(input_ids=ids, labels=labels).loss.detach()) * count
        tokens += count
    return total / tokens


def test_the_loss_is_the_plain_token_mean_of_the_demonstrations_without_their_prompts(
    run: Path, config: Config, materials: Materials
) -> None:
    batch = PromptSampler(materials.train, config.training.seed).take(config.rollout.prompts_per_batch)
    first = steps(run)[0]
    model = open_plain(materials.model_path)
    assert first["policy/loss"] == pytest.approx(plain_loss(model, batch), rel=1e-5)
    assert first["tokens/trained"] == sum(len(prompt.demonstration_ids) for prompt in batch)
    # The comparison can tell: with the prompts in, transformers says something else.
    assert plain_loss(model, batch, with_prompts=True) > 1.5 * first["policy/loss"]


def test_what_was_shown_has_become_likelier(run: Path, config: Config, materials: Materials) -> None:
    before, after = materials.model_path, run / "checkpoints" / "step_000004"
    shown = PromptSampler(materials.train, config.training.seed).take(4 * config.rollout.prompts_per_batch)
    assert plain_loss(open_plain(after), shown) < plain_loss(open_plain(before), shown)


def test_a_demonstration_is_the_working_and_stops_where_the_sampler_does(config: Config, materials: Materials) -> None:
    tokenizer = AutoTokenizer.from_pretrained(materials.model_path)
    for prompt in materials.train:
        assert prompt.demonstration_ids.count(tokenizer.eos_token_id) == 1
        assert prompt.demonstration_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt.demonstration_ids[:-1]) == prompt.problem.demonstration
        assert str(prompt.problem.demonstration).endswith(f"</think><answer>{prompt.problem.answer}</answer>")
    assert all(not prompt.demonstration_ids for prompt in materials.held_out)


def test_rl_and_sft_start_from_the_same_model_and_prompts(config: Config, materials: Materials) -> None:
    learner = config.learner.model_copy(update={"objective": "grpo"})
    sampled = prepare(config.model_copy(update={"learner": learner}), lambda _: None)
    assert sampled.model_path == materials.model_path
    assert [p.token_ids for p in sampled.train] == [p.token_ids for p in materials.train]
    assert [p.token_ids for p in sampled.held_out] == [p.token_ids for p in materials.held_out]


def test_killed_after_step_2_and_resumed_it_is_bit_for_bit_the_undisturbed_run(run: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "checkpoints" / "step_000004")  # as if killed in step 4: its metrics stand there already
    assert main(["--resume", str(killed)]) == 0
    assert metrics(killed) == metrics(run)
    for name in ("model.safetensors", "trainer/rank_0.safetensors", "trainer/rank_0.json"):
        ours, theirs = (folder / "checkpoints" / "step_000004" / name for folder in (killed, run))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_there_is_nothing_to_replay(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(run), "--step", "1"]) == 2
    assert "no rollouts to replay" in capsys.readouterr().err


def test_sft_and_rl_stand_on_one_page(run: Path, tmp_path: Path) -> None:
    line = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6, "verdict/correct": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, **line}) + "\n" for s in (0, 4)))
    draw(tmp_path / "page.png", {"SFT": run, "RL": tmp_path})
    (axes,) = plt.gcf().axes
    curves = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for label, at in (("held out, SFT", [0, 2, 4]), ("held out, RL", [0, 4])):
        assert list(curves[label][0].get_xdata()) == at
    plt.close()
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


# -- the parts ------------------------------------------------------------------------------------


class Recorder:
    """A learner that only notes what it is given."""

    def __init__(self) -> None:
        self.batches: list[list[Sequence]] = []

    def update(self, sequences: list[Sequence], on_policy: bool, limits: Limits) -> dict[str, float]:
        assert not on_policy, "there is no sampler to agree with"
        self.batches.append(sequences)
        names = ("policy/loss", "policy/entropy", "policy/grad_norm", "policy/learning_rate", "policy/kl")
        more = ("tokens/trained", "rollout/logprob_diff", "policy/updates", "policy/filtered")
        return dict.fromkeys((*names, *more), len(self.batches))

    def with_old_logprobs(self, sequences: list[Sequence]) -> list[Sequence]:
        raise AssertionError("the likelihood has no pi_old")


def demonstrated(count: int) -> list[Prompt]:
    return [Prompt(i, Problem(str(i), "", ""), (i,), (i, 9)) for i in range(count)]


def test_a_batch_of_demonstrations_is_cut_into_updates_and_gone_through_in_epochs() -> None:
    config = load_config(
        None, [SFT, "rollout.prompts_per_batch=6", "learner.completions_per_update=3", "learner.epochs_per_batch=2"]
    )
    learner = Recorder()
    learned = imitate(learner, config, demonstrated(6))
    seen = [[int(sequence.prompt_ids[0]) for sequence in batch] for batch in learner.batches]
    assert seen == [[0, 1, 2], [3, 4, 5]] * 2
    assert learned["policy/updates"] == config.updates_per_batch == 4
    assert learned["policy/loss"] == 2.5 and "rollout/logprob_diff" not in learned and "policy/kl" not in learned
    assert "policy/kl" in imitate(Recorder(), load_config(None, [SFT, "learner.kl_coefficient=0.1"]), demonstrated(6))


def test_a_sequence_is_a_prompt_and_its_demonstration() -> None:
    made = sequence_of(Prompt(0, Problem("", "", ""), (1, 2, 3), (4, 5)))
    assert (made.prompt_ids.tolist(), made.completion_ids.tolist()) == ([1, 2, 3], [4, 5])
    assert made.advantage == 1.0 and not np.any(made.sampler_logprobs) and not made.truncated


def test_a_step_is_shown_by_its_loss_where_there_is_no_reward() -> None:
    out = io.StringIO()
    display = Display("off", Console(file=out, width=200))
    common = {"tokens/per_second": 10.0, "time/update": 1.0, "time/sync": 2.0, "policy/updates": 1.0}
    display.step(1, {**common, "policy/loss": 0.5})
    judged = {"reward/mean": 0.25, "verdict/correct": 0.5, "time/sample": 3.0, "time/verify": 4.0}
    display.step(2, {**common, **judged, "rollout/logprob_diff": 1e-6})
    display.step(3, {**common, **judged, "policy/updates": 0.0})
    sampled = "reward 0.250 correct 50.0% 10 tokens/s sample 3.00 verify 4.00 update 1.00 sync 2.00 s"
    assert [" ".join(line.split()) for line in out.getvalue().splitlines()] == [
        "step 1 loss 0.500 10 tokens/s update 1.00 sync 2.00 s",
        f"step 2 {sampled} logp diff 1.0e-06",
        f"step 3 {sampled} no update: all filtered",
    ]


# -- what may be asked for ------------------------------------------------------------------------


def refusal(*overrides: str) -> str:
    with pytest.raises(UsageError) as refused:
        load_config(None, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_prompt_counts_once_however_many_completions_rl_would_sample() -> None:
    config = load_config(None, [SFT, "rollout.prompts_per_batch=8"])
    assert config.rollout.completions_per_prompt == 8
    assert (config.completions_per_batch, config.completions_per_update, config.updates_per_batch) == (8, 8, 1)
    text = refusal(SFT, "rollout.prompts_per_batch=8", "learner.completions_per_update=5")
    assert "batch of 8 completions (rollout.prompts_per_batch=8 demonstrations); choose 4 or 8" in text


def test_a_dataset_without_demonstrations_is_refused_before_it_is_read() -> None:
    assert "data.demonstration_column is null" in refusal(*MINE)
    load_config(None, [*MINE, "data.demonstration_column=worked"])


@pytest.mark.parametrize(
    "override",
    [
        "learner.filter_threshold=0",
        "learner.reference_reset=interval",
        "rollout.refill_rounds=1",
        "rewards.shuffle=true",
    ],
)
def test_what_wants_groups_or_rewards_contradicts_it(override: str) -> None:
    text = refusal(SFT, override, "learner.kl_coefficient=0.1")
    assert f"neither groups nor rewards, and {override.partition('=')[0]} contradicts" in text


@pytest.mark.parametrize(
    "overrides",
    [
        (SFT, "rollout.completions_per_prompt=1"),
        (SFT, "rollout.temperature=0.8"),
        (SFT, "rollout.top_k=5"),
        (SFT, "learner.clip_high=0.3"),
        (SFT, "learner.importance_correction=off"),
        (SFT, "learner.advantage=no_std"),
        (SFT, "data.demonstration_column=worked"),
        ("data.dataset=mine.jsonl", "data.demonstration_column=worked"),
    ],
)
def test_an_option_without_effect_is_refused(overrides: tuple[str, ...]) -> None:
    assert f"{overrides[-1]} would have no effect" in refusal(*overrides).replace('"', "")


def file_config(folder: Path, shown: list[str], *overrides: str) -> Config:
    rows = [{"question": f"{i} + 1", "answer": str(i + 1), "worked": text} for i, text in enumerate(shown)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = (f"model.cache_dir={CACHE}", "model.warm_start.steps=1", "data.held_out_problems=2")
    asked = (f"data.dataset={folder}/mine.jsonl", "data.demonstration_column=worked", SFT)
    return load_config(SMALL, [*place, *asked, *overrides])


def test_long_demonstrations_are_dropped_counted_and_said_and_held_out_problems_stay(tmp_path: Path) -> None:
    said: list[str] = []
    shown = ["it is so" if i % 4 else "it is so" * 9 for i in range(20)]
    made = prepare(file_config(tmp_path, shown), said.append)
    assert all(prompt.problem.demonstration == "it is so" for prompt in made.train) and len(made.held_out) == 2
    dropped = 18 - len(made.train)
    assert f"{len(made.train)} demonstrations, {dropped} dropped as longer than rollout.max_completion_tokens" in said
    assert 3 <= dropped <= 5 and "first demonstration:\n  | it is so<eos>" in said


def test_an_empty_demonstration_and_nothing_but_long_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"row 3 \(its 'worked' is empty"):
        prepare(file_config(tmp_path, ["1", "2", "", "4"]), lambda _: None)
    with pytest.raises(UsageError, match=r"All 2 demonstrations are longer than rollout\.max_completion_tokens=4"):
        prepare(file_config(tmp_path, ["12345"] * 4, "rollout.max_completion_tokens=4"), lambda _: None)


def test_the_two_quickstarts_differ_in_nothing_but_objective_and_learning_rate() -> None:
    rl, sft = load_config("quickstart", []), load_config("quickstart_sft", [])
    learner = rl.learner.model_copy(update={"objective": "sft", "learning_rate": sft.learner.learning_rate})
    assert sft == rl.model_copy(update={"learner": learner})
