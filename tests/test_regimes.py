"""Regimes other than plain GRPO: refills and filtering, several updates a batch, reference resets, A*-PO."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from actors.sampling import Sampled
from cluster.loop import flat, learn, trained_groups
from cluster.optimal_values import RewardFile, optimal_values
from cluster.reference import ReferenceResets, References
from cluster.train import main
from configs.errors import UsageError
from configs.schema import Config, Learner
from data.records import Completion, Group, Problem, Prompt, Verdict
from data.rollouts import read_groups
from learner.alarms import Limits
from learner.batching import Sequence
from tests.small_run import ROOT, arguments, metrics


def group(visit: int, rewards: Iterable[float]) -> Group:
    """A group of one-token completions with these rewards."""
    token, nothing = np.array([5], dtype=np.int32), np.zeros(1, dtype=np.float32)
    rewards = tuple(rewards)
    completions = tuple(Completion(i, 0, token, nothing, token * 0, "", "stop") for i in range(len(rewards)))
    verdicts = tuple(Verdict({}, reward, "wrong", None) for reward in rewards)
    return Group(Prompt(visit, Problem(str(visit), "", ""), (1, 2)), completions, verdicts)


def config(**sections: object) -> Config:
    rollout = {"prompts_per_batch": 3, "completions_per_prompt": 2}
    return Config.model_validate({"rollout": rollout, **sections})


FLAT, SPREAD = (1.0, 1.0), (0.0, 1.0)


# -- dynamic sampling -----------------------------------------------------------------------------


def chosen(groups: list[Group]) -> list[int]:
    return [group.prompt.visit for group in trained_groups(config(), groups, 1)]


def test_refilled_batches_take_the_groups_with_spread_in_visit_order() -> None:
    rewards = [FLAT, SPREAD, FLAT, SPREAD, FLAT, SPREAD]
    assert chosen([group(visit, each) for visit, each in enumerate(rewards)]) == [1, 3, 5]


def test_where_the_rounds_did_not_suffice_the_first_flat_groups_fill_the_places() -> None:
    rewards = [FLAT, FLAT, SPREAD, FLAT, FLAT, FLAT, SPREAD]
    assert chosen([group(visit, each) for visit, each in enumerate(rewards)]) == [0, 2, 6]


def test_a_group_is_flat_only_if_its_rewards_are_exactly_equal() -> None:
    assert flat(group(0, (0.3, 0.3)))
    assert not flat(group(0, (0.3, 0.1 + 0.2)))


# -- several updates ------------------------------------------------------------------------------


class Recorder:
    """Takes down the update batches; those whose advantages are all 0 make no step, as under filtering."""

    def __init__(self) -> None:
        self.asked_for_old = 0
        self.updates: list[tuple[int, bool]] = []

    def with_old_logprobs(self, sequences: list[Sequence]) -> list[Sequence]:
        self.asked_for_old += 1
        return sequences

    def update(self, sequences: list[Sequence], on_policy: bool, limits: Limits) -> dict[str, float]:
        self.updates.append((len(sequences), on_policy))
        if not any(s.advantage for s in sequences):
            return {"policy/filtered": 1.0, "policy/updates": 0.0}
        number = float(len(self.updates))
        return {"policy/filtered": 0.0, "policy/updates": 1.0, "policy/loss": number, "rollout/logprob_diff": number}


def test_multi_goes_through_the_whole_batch_several_times_after_one_pass_for_pi_old() -> None:
    learner = Recorder()
    metrics = learn(learner, config(learner={"epochs_per_batch": 3}), [group(visit, SPREAD) for visit in range(3)])
    assert learner.updates == [(6, True), (6, False), (6, False)] and learner.asked_for_old == 1
    assert metrics["policy/updates"] == 3.0 and metrics["policy/loss"] == 2.0
    assert metrics["rollout/logprob_diff"] == 1.0  # of the first update, the only one on-policy


def test_mini_cuts_the_batch_into_small_updates() -> None:
    learner = Recorder()
    learn(learner, config(learner={"completions_per_update": 2}), [group(visit, SPREAD) for visit in range(3)])
    assert learner.updates == [(2, True), (2, False), (2, False)] and learner.asked_for_old == 1


def test_the_first_update_that_is_made_is_the_on_policy_one() -> None:
    learner = Recorder()
    groups = [group(0, FLAT), group(1, SPREAD), group(2, SPREAD)]
    metrics = learn(learner, config(learner={"completions_per_update": 2}), groups)
    assert learner.updates == [(2, True), (2, True), (2, False)]
    assert metrics["policy/updates"] == 2.0 and metrics["policy/filtered"] == pytest.approx(1 / 3)


def test_a_batch_of_flat_groups_has_no_loss_to_report() -> None:
    metrics = learn(Recorder(), config(), [group(visit, FLAT) for visit in range(3)])
    assert metrics == {"policy/filtered": 1.0, "policy/updates": 0.0}


# -- resets of the reference ----------------------------------------------------------------------


def due(kind: str, window: int, rewards: list[float]) -> list[int]:
    """The steps, from 1, after which a reset is due."""
    options = {"reference_reset": kind, "reference_reset_steps": window, "kl_coefficient": 0.1}
    resets = ReferenceResets(Learner.model_validate(options))
    return [step for step, reward in enumerate(rewards, 1) if resets.due(reward)]


def test_resets_come_at_the_interval_at_a_plateau_or_never() -> None:
    assert due("interval", 3, [0.0] * 10) == [3, 6, 9]
    assert due("never", 3, [0.0] * 10) == []
    assert due("plateau", 2, [0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2]) == [6]  # 0.3 + 0.4, then 0.4 + 0.3
    assert due("plateau", 2, [0.1 * step for step in range(20)]) == []
    assert due("plateau", 2, [0.5] * 9) == [4, 8]


def test_resets_go_on_where_a_checkpoint_left_them() -> None:
    options = Learner(reference_reset="plateau", reference_reset_steps=3, kl_coefficient=0.1)
    rewards = [0.1, 0.5, 0.4, 0.3, 0.5, 0.2, 0.4, 0.1, 0.3, 0.2]
    whole, first = ReferenceResets(options), ReferenceResets(options)
    expected = [whole.due(reward) for reward in rewards]
    found = [first.due(reward) for reward in rewards[:4]]
    second = ReferenceResets(options, first.rewards)
    assert found + [second.due(reward) for reward in rewards[4:]] == expected
    assert any(expected)


def test_old_references_are_kept_while_a_checkpoint_needs_them(tmp_path: Path) -> None:
    references = References(tmp_path, tmp_path / "initial")
    assert references.path == tmp_path / "initial"
    for step in (2, 4, 6):
        references.begin(step)
    references.keep(["step_000004", None])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000006"]
    assert references.path == tmp_path / "step_000006"


# -- A*-PO's values -------------------------------------------------------------------------------


def values_of(steps: int, folder: Path, sample: Callable[[list[Prompt]], Sampled] | None) -> dict[str, float]:
    """The values of a run of so many steps; its rewards go to a file that all runs in the folder share."""
    prompts = [Prompt(0, Problem(str(number), "", "gold"), (1,)) for number in range(20)]
    options = config(training={"steps": steps}, learner={"objective": "a_star_po"})
    shared = RewardFile(folder / "shared" / "rewards.jsonl") if sample else None
    return dict(optimal_values(options, prompts, folder / f"run_{steps}.json", shared, sample, lambda _: None))


class Workers:
    """Sample a group with spread for every prompt, and take down whose; die at portion `dies_at`."""

    def __init__(self, dies_at: int = 0) -> None:
        self.asked: list[list[str]] = []
        self.visits: dict[str, int] = {}
        self.dies_at = dies_at

    def __call__(self, prompts: list[Prompt]) -> Sampled:
        if len(self.asked) + 1 == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append([prompt.problem.id for prompt in prompts])
        self.visits |= {prompt.problem.id: prompt.visit for prompt in prompts}
        return Sampled([replace(group(0, SPREAD), prompt=prompt) for prompt in prompts], 0.0, 0.0)


def test_values_are_sampled_once_for_the_problems_that_runs_visit(tmp_path: Path) -> None:
    first, second = Workers(), Workers()
    values = values_of(2, tmp_path, first)
    assert [len(portion) for portion in first.asked] == [3, 3]
    assert values == {name: pytest.approx(0.5 * np.log((1 + np.exp(2)) / 2)) for names in first.asked for name in names}
    assert values_of(2, tmp_path, None) == values, "the run's own folder has them"
    assert values_of(4, tmp_path, second).items() >= values.items()
    asked = [name for portion in second.asked for name in portion]
    assert len(asked) == 6 and not set(asked) & set(values), "a second run samples only what the first did not"
    with pytest.raises(UsageError, match=r"training\.steps=6"):
        values_of(6, tmp_path, None)


def test_an_interrupted_first_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    undisturbed, interrupted, again = Workers(), Workers(dies_at=3), Workers()
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    expected = values_of(4, tmp_path / "undisturbed", undisturbed)
    with pytest.raises(KeyboardInterrupt):
        values_of(4, tmp_path / "killed", interrupted)
    with (tmp_path / "killed" / "shared" / "rewards.jsonl").open("a") as file:
        file.write('{"id": "torn')
    assert values_of(4, tmp_path / "killed", again) == expected
    assert interrupted.asked + again.asked == undisturbed.asked
    assert interrupted.visits | again.visits == undisturbed.visits, "whose seeds are then the same"


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("regimes")


def test_refills_filtering_and_top_k_run_and_replay(folder: Path) -> None:
    more = ("learner.filter_threshold=0", "rollout.refill_rounds=3", "rollout.top_k=50", "training.steps=2")
    assert main(arguments(folder, "dash", *more)) == 0
    lines = [line for line in metrics(folder / "dash") if "policy/updates" in line]
    assert len(lines) == 2
    for line in lines:
        groups = read_groups(folder / "dash" / "rollouts" / f"step_{line['step']:06d}.parquet")
        assert sum(not flat(group) for group in groups) <= 4, "a group with spread was sampled for nothing"
        assert line["rollout/logprob_diff"] < 1e-5 if line["policy/updates"] else "policy/loss" not in line
    visits = [
        group.prompt.visit
        for line in lines
        for group in read_groups(folder / "dash" / "rollouts" / f"step_{line['step']:06d}.parquet")
    ]
    assert visits == list(range(len(visits))) and len(visits) > 8, "small.yaml is meant to make flat groups"
    assert lines[0]["policy/updates"] == 1.0


def test_a_star_po_runs_from_one_completion_a_prompt(folder: Path) -> None:
    more = ("learner.objective=a_star_po", "rollout.completions_per_prompt=1", "rollout.prompts_per_batch=16")
    assert main(arguments(folder, "a_star", *more, "training.steps=2")) == 0
    assert len(json.loads((folder / "a_star" / "optimal_values.json").read_text())) == 32


def test_a_run_whose_reference_was_reset_resumes_bit_for_bit(folder: Path) -> None:
    """With two epochs of two gspo updates a batch, an entropy bonus and a fresh optimizer after each reset."""
    more = [
        *("learner.objective=gspo", "learner.epochs_per_batch=2", "learner.completions_per_update=8"),
        *("learner.kl_coefficient=0.01", "learner.entropy_coefficient=0.01", "learner.reset_optimizer=true"),
        *("learner.reference_reset=interval", "learner.reference_reset_steps=2"),
    ]
    assert main(arguments(folder, "whole", *more)) == 0
    assert main(arguments(folder, "halves", *more, "training.steps=2")) == 0
    assert main(["--resume", str(folder / "halves"), "training.steps=4"]) == 0
    steps = {name: [line for line in metrics(folder / name) if "policy/loss" in line] for name in ("whole", "halves")}
    assert steps["whole"] == steps["halves"] and [line["step"] for line in steps["whole"]] == [1, 2, 3, 4]
    weights = [load_file(folder / n / "checkpoints" / "step_000004" / "model.safetensors") for n in steps]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    reference = load_file(folder / "whole" / "references" / "step_000002" / "model.safetensors")
    checkpoint = load_file(folder / "whole" / "checkpoints" / "step_000002" / "model.safetensors")
    assert all((reference[name] == checkpoint[name]).all() for name in reference)
    assert steps["whole"][-1]["policy/version"] == 16.0


def test_all_of_them_replay_to_the_same_loss(folder: Path) -> None:
    """Last: it reads what the runs above have left."""
    program = "import sys; from pocketgrpo import main; sys.exit(main(['replay', *sys.argv[1:]]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder / name), "--step", step],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for name, step in (("dash", "1"), ("a_star", "1"), ("whole", "3"))
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "the same, bit for bit" in output, output
