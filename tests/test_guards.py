"""Health guards: none fires on a healthy run, each on its fault, a skipped batch changes no bit of the learner, and a
run that went back decides as the run that was left alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cluster.guards
import cluster.loop
from cluster.guards import COLLAPSE, FLAT_STEPS, KNOWN, SPIKE, WINDOW, Guards
from cluster.run_folder import RunFolder
from cluster.train import main
from cluster.update_metrics import combined
from configs.errors import RunError, UsageError
from configs.loading import dump_config, load_config
from configs.schema import GUARDS
from data.records import Group
from learner.alarms import Limits
from learner.batching import Sequence
from tests.learner_cases import TINY, Batch, Case, Job, run_all, tiny_models, update
from tests.small_run import arguments, metrics, status

# -- a learner rank, through DeepSpeed ------------------------------------------------------------

BATCH, OTHER_BATCH = Batch(old=0.4), Batch(seed=4, count=6, old=0.4)
FAULTS: dict[str, list[Any]] = {
    "nan loss": update(Batch(advantage=math.nan)),
    "overflow": update(Batch(advantage=1e38)),
    "grad_norm": update(BATCH, limits=Limits(grad_norm=1e-6)),
    "entropy": update(BATCH, limits=Limits(entropy=100.0)),
    "logprob_diff": update(Batch(shift=0.5), on_policy=True),
}
FIRED = ("nan", "nan", "grad_norm", "entropy", "logprob_diff")
SKIP = tuple((guard, "skip") for guard in GUARDS)
SKIPS = [  # every class of DeepSpeed's around the optimizer, and gradients that other ranks have a share in
    Case(0, use="skip", guards=SKIP),
    Case(3, use="skip", guards=SKIP),
    *(Case(zero, dtype="bfloat16", optimizer="adamw_8bit", use="skip", guards=SKIP) for zero in (0, 2, 3)),
    Case(1, ranks=2, dtype="bfloat16", optimizer="adamw_8bit", use="skip", guards=SKIP),
    Case(2, ranks=2, budget=TINY, optimizer="adamw_8bit", use="skip", guards=SKIP),
    Case(3, ranks=2, budget=TINY, dtype="bfloat16", use="skip", guards=SKIP),
    *(Case(zero, dtype="bfloat16", optimizer="adamw_cpu", use="skip", guards=SKIP) for zero in (2, 3)),
]
OPEN = Case(2, use="skip", mutant="a gate left open", guards=SKIP)
WARNS = Case(2, use="warn", guards=tuple((guard, "warn") for guard in ("grad_norm", "entropy", "logprob_diff")))
STOPS = Case(3, use="stop", guards=tuple((guard, "stop") for guard in GUARDS))


class Outcomes:
    """The files and answers of all jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        models = tiny_models(folder / "models")
        jobs = [job for case in SKIPS for job in (self.skip(case), self.without(case))]
        jobs += [self.skip(OPEN), Job(WARNS, [FAULTS[name] for name in ("grad_norm", "entropy", "logprob_diff")])]
        jobs += [Job(STOPS, [*FAULTS.values(), self.weights("stop")])]
        self.answers = run_all(folder / "runs", models, jobs)
        self.initial = load_file(models["untied"] / "model.safetensors")

    def weights(self, name: str) -> list[Any]:
        return ["weights", str(self.folder / f"{name}.safetensors")]

    def save(self, name: str) -> list[Any]:
        return ["save", str(self.folder / name)]

    def skip(self, case: Case) -> Job:
        """A fault first, then all of them between two updates."""
        first, *_ = FAULTS.values()
        between = [self.save(f"{case.name}-before"), *FAULTS.values(), self.save(f"{case.name}-after")]
        return Job(case, [first, update(BATCH), *between, update(OTHER_BATCH), self.weights(case.name)])

    def without(self, case: Case) -> Job:
        name = f"{case.name}-without"
        return Job(case, [update(BATCH), update(OTHER_BATCH), self.weights(name)], suffix="-without")

    def loaded(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def changed(self, case: Case) -> list[str]:
        """Files with weights, optimizer state or version that the faults have changed."""
        before, after = self.folder / f"{case.name}-before", self.folder / f"{case.name}-after"
        files = [path.relative_to(before) for path in before.rglob("*") if path.is_file()]
        assert len([path for path in files if path.parent.name == "trainer"]) == 2 * case.ranks
        return sorted(path.name for path in files if (before / path).read_bytes() != (after / path).read_bytes())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tmp_path_factory.mktemp("guards"))


@pytest.mark.parametrize("case", SKIPS, ids=[case.name for case in SKIPS])
def test_a_skipped_batch_leaves_weights_moments_and_version_bit_for_bit(case: Case, outcomes: Outcomes) -> None:
    first, _, _, *skipped, _, after, version, _ = outcomes.answers[case.name]
    for answer, guard in zip([first, *skipped], (FIRED[0], *FIRED), strict=True):
        assert answer["policy/updates"] == 0.0
        assert [name for name in answer if name.startswith("guard/")] == [f"guard/{guard}"]
    assert outcomes.changed(case) == []
    _, alone, version_alone, _ = outcomes.answers[f"{case.name}-without"]
    assert (after, version) == (alone, version_alone) and version == 2 and after["policy/updates"] == 1.0
    weights, without = outcomes.loaded(case.name), outcomes.loaded(f"{case.name}-without")
    assert all(torch.equal(weights[name], without[name]) for name in without)


def test_a_gate_left_open_would_be_seen(outcomes: Outcomes) -> None:
    assert outcomes.changed(OPEN) == ["model.safetensors", "rank_0.safetensors"]


def test_a_warning_steps_and_counts(outcomes: Outcomes) -> None:
    *answers, _ = outcomes.answers[WARNS.name]
    for answer, guard in zip(answers, FIRED[2:], strict=True):
        assert answer["policy/updates"] == 1.0 and answer[f"guard/{guard}"] == 1.0


def test_a_stop_says_what_was_expected_what_came_and_what_to_do_and_changes_nothing(outcomes: Outcomes) -> None:
    *answers, version, _ = outcomes.answers[STOPS.name]
    said = [
        "The loss of policy version 0 is nan.",
        "The gradient of policy version 0 overflowed",
        "expected up to 1e-06 after the steps before. Look at the rollouts",
        "nats a token, expected at least 1.00e+02 after the steps before. Go back",
        "differ by 5.00e-01 on average (limit rollout.logprob_diff=0.001)",
    ]
    for answer, text, guard in zip(answers, said, FIRED, strict=True):
        assert text in answer["error"] and answer["error"].endswith(f"training.guards.{guard}=stop.")
    assert version == 0
    assert all(torch.equal(outcomes.initial[name], tensor) for name, tensor in outcomes.loaded("stop").items())


# -- what the loop knows --------------------------------------------------------------------------


def line(step: int, **changes: float) -> dict[str, Any]:
    """A healthy step's line of metrics.jsonl."""
    healthy = {
        "policy/grad_norm": 2.0 + step % 3,
        "policy/entropy": 0.5 - 0.005 * step,
        "policy/updates": 1.0,
        "reward/mean": 0.5,
        "reward/flat_groups": 0.25,
        "rollout/truncated": 0.0,
        "rollout/logprob_diff": 1e-6,
        "verdict/correct": 0.5,
        "verdict/error": 0.0,
    }
    return {"step": step, **healthy, **{name.replace("__", "/"): value for name, value in changes.items()}}


HEALTHY = [line(step) for step in range(1, 21)]


def test_limits_are_multiples_of_running_medians_once_some_steps_are_known() -> None:
    config = load_config(None)
    assert Guards(config, HEALTHY[: KNOWN - 1]).limits() == Limits()
    limits = Guards(config, HEALTHY[:9]).limits()
    assert limits.grad_norm == SPIKE * 3.0 and limits.entropy == pytest.approx(COLLAPSE * 0.475)
    flat = [line(step, policy__grad_norm=0.0) for step in range(1, 41)]
    assert Guards(config, [*HEALTHY, *flat]).limits().grad_norm == SPIKE * 3.0, "no gradient is no norm to compare with"
    small = [line(step, policy__grad_norm=1e-3) for step in range(1, 21)]
    assert Guards(config, small).limits().grad_norm == config.learner.max_grad_norm, "what is not clipped is no spike"
    risen = Guards(config, [*HEALTHY, *(line(20 + i, policy__grad_norm=100.0) for i in range(WINDOW // 2 + 1))])
    assert risen.limits().grad_norm > 100.0, "a new level is taken on"
    assert Guards(load_config(None, ["learner.objective=sft"]), HEALTHY).limits().entropy == 0.0


BEFORE_FLAT = [line(20 + i, reward__flat_groups=1.0) for i in range(1, FLAT_STEPS)]


@pytest.mark.parametrize(
    ("guard", "before", "fault", "almost", "said"),
    [
        ("truncated", [], {"rollout__truncated": 1.0}, {"rollout__truncated": 0.99}, "max_completion_tokens=32"),
        ("verifier_errors", [], {"verdict__error": 0.6}, {"verdict__error": 0.5}, "more than 50%"),
        ("reward_flat", BEFORE_FLAT, {"reward__flat_groups": 1.0}, {}, "For 5 steps no group"),
    ],
)
def test_a_sampled_batch_raises_its_alarm_by_the_action_asked_for(
    guard: str, before: list[dict[str, Any]], fault: dict[str, float], almost: dict[str, float], said: str
) -> None:
    for action in ("warn", "skip", "stop"):
        guards = Guards(load_config(None, [f"training.guards.{guard}={action}"]), [*HEALTHY, *before])
        assert guards.look(line(30, **almost)).metrics == {}
        if action == "stop":
            with pytest.raises(RunError, match=said):
                guards.look(line(30, **fault))
        else:
            alarms = guards.look(line(30, **fault))
            assert (alarms.metrics, alarms.skip) == ({f"guard/{guard}": 1.0}, action == "skip")


def test_groups_are_suddenly_flat_only_after_spread_in_a_row_and_not_when_all_is_right() -> None:
    config, flat = load_config(None), {"reward__flat_groups": 1.0}
    solved = line(30, reward__flat_groups=1.0, verdict__correct=1.0)
    assert not Guards(config, BEFORE_FLAT).look(line(30, **flat)).metrics, "there never was spread"
    assert not Guards(config, [*HEALTHY, *BEFORE_FLAT]).look(solved).metrics
    assert not Guards(config, [*HEALTHY, *BEFORE_FLAT[1:]]).look(line(30, **flat)).metrics
    assert not Guards(config, [*HEALTHY, *BEFORE_FLAT, HEALTHY[0]]).look(line(30, **flat)).metrics


def test_what_fired_is_said_the_first_tenth_and_hundredth_time_and_stands_in_the_status() -> None:
    guards = Guards(load_config(None), HEALTHY)
    stops = ("nan", "logprob_diff", "verifier_errors")
    defaults = {guard: {"action": "stop" if guard in stops else "warn", "times": 0} for guard in GUARDS}
    assert guards.facts() == defaults
    said = [guards.observe({**line(20 + i, rollout__truncated=1.0), "guard/truncated": 1.0}) for i in range(1, 121)]
    assert [i for i, texts in enumerate(said, 1) if texts] == [1, 10, 100]
    assert said[0] == [
        "guard truncated at step 21, warn: every completion of the batch is truncated (rollout/truncated 1); 1 so far"
    ]
    facts = guards.facts()
    saw = "every completion of the batch is truncated (rollout/truncated 1)"
    assert facts.pop("truncated") == {"saw": saw, "step": 140, "times": 120, "action": "warn"}
    assert facts == {guard: of for guard, of in defaults.items() if guard != "truncated"}


def test_the_metrics_of_several_updates_tell_of_those_made_or_else_of_those_skipped() -> None:
    empty = {"policy/updates": 0.0, "policy/filtered": 1.0}
    made = {"policy/updates": 1.0, "policy/filtered": 0.0, "policy/loss": 1.0}
    spiked = {**made, "policy/updates": 0.0, "policy/loss": 9.0, "guard/grad_norm": 1.0}
    assert combined([empty, spiked, made]) == {
        **made, "policy/filtered": pytest.approx(1 / 3), "guard/grad_norm": 1.0,
    }  # fmt: skip
    assert combined([empty, spiked, spiked])["policy/loss"] == 9.0
    assert combined([empty, spiked, spiked])["guard/grad_norm"] == 2.0


# -- the option -----------------------------------------------------------------------------------


def test_naming_one_guard_changes_only_that_one(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("training: {guards: {entropy: stop}}\n")
    given = load_config(file, ["training.guards.nan=skip"])
    assert given.training.guards == {**GUARDS, "entropy": "stop", "nan": "skip"}
    file.write_text(dump_config(given))
    assert load_config(file) == given


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.guards.entrpy=stop", "has no guard entrpy; did you mean entropy? The guards are nan, grad_norm"),
        ("training.guards.colour=stop", "has no guard colour; the guards are nan"),
        ("training.guards.nan=warn", "would step to weights that are no numbers; choose skip"),
        ("training.guards.nan=halt", "expected one of warn, skip, stop; write for example training.guards.nan=skip"),
        ("training.guards=stop", "expected a mapping from names to one of warn, skip, stop"),
    ],
)
def test_what_is_no_guard_or_no_action_is_refused(override: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_config(None, [override])
    assert said in str(refused.value)


def test_imitation_has_no_use_for_guards_of_what_is_sampled() -> None:
    load_config(None, ["learner.objective=sft", "training.guards.grad_norm=skip"])
    with pytest.raises(UsageError, match="would have no effect"):
        load_config(None, ["learner.objective=sft", "training.guards.truncated=stop"])


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def healthy(folder: Path) -> Path:
    """The small run at full length, with every guard's default."""
    more = ("training.steps=30", "checkpoint.every=0", "telemetry.tensorboard=false")
    assert main(arguments(folder, "healthy", *more)) == 0
    return folder / "healthy"


def test_no_guard_fires_on_a_healthy_run(healthy: Path) -> None:
    assert {guard: of["times"] for guard, of in status(healthy)["guards"].items()} == dict.fromkeys(GUARDS, 0)
    lines = metrics(healthy)
    assert len([each for each in lines if "policy/grad_norm" in each]) == 30
    assert not [name for each in lines for name in each if name.startswith("guard/")]


def test_a_guard_decides_after_a_rewind_as_in_the_run_left_alone(healthy: Path, tmp_path: Path) -> None:
    """On the recorded steps, from every step on, through the file that a resumed run reads."""
    assert_same_after_rewind(healthy, tmp_path)


def assert_same_after_rewind(run: Path, tmp_path: Path) -> None:
    lines = RunFolder(run).read_metrics()
    config = load_config(run / "config.yaml")
    for step in range(lines[-1]["step"]):
        rewound = RunFolder(tmp_path)
        rewound.metrics.write_text((run / "metrics.jsonl").read_text())
        rewound.rewind(step)
        left_alone, resumed = Guards(config), Guards(config, rewound.read_metrics())
        for each in lines:
            if each["step"] > step:
                said = left_alone.observe(each)
                assert resumed.observe(each) == said
            else:
                left_alone.observe(each)
            assert each["step"] < step or (
                (resumed.limits(), resumed.facts()) == (left_alone.limits(), left_alone.facts())
            )


SPIKED, LOST, CUT, BROKEN, SHIFTED, SURE, FLAT = 4, 5, 6, 7, 8, 9, 11  # the steps of the planted faults


@pytest.fixture(scope="module")
def faulty(folder: Path) -> Path:
    """A run of which nearly every step from the fourth on has a fault, planted in what was sampled; only the entropy is
    right, and held to a limit of twice what it was."""
    guards = [f"training.guards.{guard}=skip" for guard in GUARDS if guard != "truncated"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster.guards, "KNOWN", 2)
        patched.setattr(cluster.guards, "FLAT_STEPS", 2)
        patched.setattr(cluster.guards, "COLLAPSE", cluster.guards.COLLAPSE)  # which changes on the way
        patched.setattr(cluster.loop, "sequences_of", with_faults(cluster.loop.sequences_of))
        patched.setattr(cluster.loop, "sample_batch", with_bad_groups(cluster.loop.sample_batch))
        more = ("training.steps=12", "checkpoint.every=1", "checkpoint.keep=12", "telemetry.tensorboard=false")
        assert main(arguments(folder, "faulty", *more, *guards)) == 0
    return folder / "faulty"


def with_faults(right: Any) -> Any:
    calls = iter(range(1, 100))

    def sequences_of(groups: list[Group], *others: Any) -> list[Sequence]:
        step, sequences = next(calls), right(groups, *others)
        advantages = {SPIKED: lambda a: 1e4 * a, LOST: lambda a: a * math.nan}
        return [replace(s, advantage=advantages.get(step, float)(s.advantage)) for s in sequences]

    return sequences_of


def with_bad_groups(right: Any) -> Any:
    calls, collapse = iter(range(1, 100)), cluster.guards.COLLAPSE
    of_completions = {
        CUT: lambda completion: replace(completion, finish_reason="length"),
        SHIFTED: lambda completion: replace(completion, logprobs=completion.logprobs + 0.5),
    }
    of_verdicts = {
        BROKEN: lambda verdict: replace(verdict, outcome="error"),
        FLAT - 1: lambda verdict: replace(verdict, total=0.0, outcome="wrong"),
        FLAT: lambda verdict: replace(verdict, total=0.0, outcome="wrong"),
    }

    def sample_batch(run: Any) -> Any:
        step, sampled = next(calls), right(run)
        cluster.guards.COLLAPSE = 2.0 if step == SURE else collapse
        if change := of_completions.get(step):
            groups = [replace(g, completions=tuple(map(change, g.completions))) for g in sampled.groups]
        elif change := of_verdicts.get(step):
            groups = [replace(g, verdicts=tuple(map(change, g.verdicts))) for g in sampled.groups]
        else:
            groups = sampled.groups
        return replace(sampled, groups=groups)

    return sample_batch


@pytest.mark.faults
def test_planted_faults_are_skipped_counted_and_shown(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {each["step"]: each for each in metrics(faulty) if "policy/updates" in each}
    fired = {step: [name for name in each if name.startswith("guard/")] for step, each in lines.items()}
    assert {step: names for step, names in fired.items() if names} == {
        SPIKED: ["guard/grad_norm"],
        LOST: ["guard/nan"],
        CUT: ["guard/truncated"],
        BROKEN: ["guard/verifier_errors"],
        SHIFTED: ["guard/logprob_diff"],
        SURE: ["guard/entropy"],
        FLAT: ["guard/reward_flat"],
    }
    assert [lines[step]["policy/version"] for step in range(1, 13)] == [1, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 6]
    found = status(faulty)["guards"]
    assert {guard: of["times"] for guard, of in found.items()} == dict.fromkeys(GUARDS, 1)
    assert found["nan"] == {
        "saw": "the loss or the gradient is no number", "step": LOST, "times": 1, "action": "skip",
    }  # fmt: skip
    json.loads((faulty / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    states = {step: trainer_state(faulty, step) for step in range(1, 13)}
    assert states[SPIKED - 1] == states[SPIKED] == states[LOST] != states[CUT]
    assert states[CUT] == states[BROKEN] == states[SHIFTED] == states[SURE] != states[FLAT - 1]
    assert states[FLAT - 1] == states[FLAT] != states[12]
    pushed = [each["step"] for each in RunFolder(faulty).read_metrics() if "time/sync_copy" in each]
    assert pushed == [1, 2, 3, CUT, SHIFTED, FLAT - 1, 12], "weights that do not seem to have arrived are pushed again"


def trainer_state(run: Path, step: int) -> tuple[bytes, ...]:
    checkpoint = run / "checkpoints" / f"step_{step:06d}"
    files = [checkpoint / "model.safetensors", *sorted((checkpoint / "trainer").iterdir())]
    return tuple(path.read_bytes() for path in files)


def test_what_fired_is_known_after_a_rewind_and_by_a_resumed_run(faulty: Path, tmp_path: Path) -> None:
    assert_same_after_rewind(faulty, tmp_path)
    before = status(faulty)["guards"]
    assert main(["--resume", str(faulty), "training.steps=13"]) == 0
    assert metrics(faulty)[-1]["step"] == 13 and status(faulty)["guards"] == before
