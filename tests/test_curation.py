"""The data block as a whole: loaded, cleaned and split, and checked before anything starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.curation import check_dataset, curate, make_sampler
from cluster.preflight import check_before_ray
from configs.errors import UsageError
from configs.loading import load_config
from configs.schema import Config, Rewards
from data.errors import DatasetError
from data.hashing import question_id
from data.prompts import Template, render_all
from data.records import Problem
from data.tokenizer import build_tokenizer

SMALL = ("data.train_problems=64", "data.held_out_problems=4")
QUESTION = "A baker bakes {} trays of {} rolls each morning and sells every single one of them before noon; how many?"


def rows(count: int, start: int = 0) -> list[dict[str, object]]:
    return [{"question": f"What is {i} + {i}?", "answer": f"twice\n#### {2 * i}"} for i in range(start, start + count)]


def write(path: Path, *entries: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def config(*overrides: object) -> Config:
    return load_config(None, [*SMALL, *map(str, overrides)])


def curated(*overrides: object) -> tuple[list[Problem], list[Problem], str]:
    said: list[str] = []
    train, held_out = curate(config(*overrides), said.append)
    return train, held_out, "\n".join(said)


def test_arithmetic_is_curated_as_it_always_was() -> None:
    from data.arithmetic import generate
    from data.problems import split_held_out

    train, held_out, said = curated()
    assert (train, held_out) == split_held_out(generate(68, 42, 2, 2, "+-"), 4, 42)
    assert said == ""


@pytest.mark.faults
def test_a_preset_in_a_folder_is_trained_on_and_its_bad_rows_are_dropped_by_option(tmp_path: Path) -> None:
    golds = {"Which?\x07": "", "So?": "np.arcsin(10/13)", "How many?": r"\binom{1000000000}{500000000}"}
    bad = [{"question": question, "answer": f"#### {gold}"} for question, gold in golds.items()]
    write(tmp_path / "gsm8k_train.jsonl", *rows(10), *bad)
    asked = ("data.dataset=gsm8k", f"data.directory={tmp_path}", "rewards.timeout_seconds=1")
    named = r"gsm8k has 3 rows .*row 11 \(.*nothing after ####.*row 12 .*row 13 .*more than 1 s .*unparsable_golds=drop"
    with pytest.raises(DatasetError, match=named):
        curated(*asked)
    train, held_out, said = curated(*asked, "data.unparsable_golds=drop")
    assert (len(train), len(held_out)) == (6, 4)
    assert said.startswith("gsm8k: 3 of 13 rows dropped: row 11 (") and "np.arcsin" in said and "\x07" not in said


def test_many_golds_that_explode_end_the_loading_also_where_bad_rows_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards.gold_check.MAX_SLOW", 2)
    slow = [{"question": f"How many? {n}", "answer": rf"\binom{{1000000000}}{{30000000{n}}}"} for n in range(3)]
    path = write(tmp_path / "p.jsonl", *rows(10), *slow)
    with pytest.raises(DatasetError, match=r"p\.jsonl: 2 gold answers take too long, the last: .*300000001"):
        curated(f"data.dataset={path}", "rewards.timeout_seconds=0.5", "data.unparsable_golds=drop")


def test_training_problems_that_a_benchmark_holds_are_dropped_from_both_parts(tmp_path: Path) -> None:
    planted = [QUESTION.format(n, n + 1) for n in range(3)]
    near = [f"A cook bakes {n} pies, how many are left if he sells {n} of them?" for n in range(3)]
    write(tmp_path / "p.jsonl", *rows(20), *({"question": text, "answer": "1"} for text in (*planted, *near)))
    write(tmp_path / "gsm8k_test.jsonl", {"question": f"Say: {QUESTION.format(7, 7)}", "answer": "49"}, *rows(2))
    write(tmp_path / "svamp.jsonl", {"question": "Else?", "answer": "1"}, *rows(20, 100))
    asked = (f"data.dataset={tmp_path / 'p.jsonl'}", f"data.directory={tmp_path}", "data.decontaminate=[gsm8k, svamp]")
    train, held_out, said = curated(*asked)
    left = {problem.question for problem in (*train, *held_out)}
    assert left == {*(str(row["question"]) for row in rows(18, 2)), *near}
    assert "2 of 26 problems" not in said and "5 of 26 problems dropped; gsm8k contains 5, the first" in said
    with pytest.raises(DatasetError, match=r"data\.few_shot shows the model what gsm8k asks"):
        curated(*asked, "data.few_shot=[{question: 'what is 1+1', answer: '2'}]")


def test_a_mixture_holds_out_of_all_and_keeps_its_shares_through_rendering(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *rows(40), {"question": "1 + 2", "answer": 3})
    mixed = config(f"data.mixture={{arithmetic: 3, {path}: 1}}", "data.held_out_problems=20")
    said: list[str] = []
    train, held_out = curate(mixed, said.append)
    assert {p.source for p in train} == {p.source for p in held_out} == {"arithmetic", str(path)}
    assert not {p.id for p in train} & {p.id for p in held_out} and len(held_out) == 20
    prompts, _ = render_all(build_tokenizer(), train, Template(), 64)
    batch = [prompt.problem.source for prompt in make_sampler(mixed, prompts).take(8)]
    assert batch.count("arithmetic") == 6


def test_pass_rates_choose_among_training_problems_and_leave_the_held_out_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *rows(40))
    rates = [
        {"id": question_id(str(row["question"])), "question": row["question"], "pass_rate": i / 40, "samples": 8}
        for i, row in enumerate(rows(36))
    ]
    measured = write(tmp_path / "rates.jsonl", *rates)
    asked = (f"data.dataset={path}", f"data.pass_rates={measured}", "data.pass_rate_range=[0.25, 0.5]")
    train, held_out, said = curated(*asked, "data.curriculum=easy_first")
    assert held_out == curated(f"data.dataset={path}")[1]
    assert train and all(0.25 <= (p.pass_rate or 0) <= 0.5 for p in train)
    assert f"{len(train)} training problems within [0.25, 0.5]" in said
    everything = curated(f"data.dataset={path}")[0]
    unmeasured = sum(p.question not in {rate["question"] for rate in rates} for p in everything)
    assert f"{unmeasured} that were not measured" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.dataset=gsm8kk"], "Did you mean gsm8k"),
        (["data.dataset=math500"], "has no problems to train on"),
        (["data.dataset=owner name/x y"], "is no name on the hub"),
        (["data.dataset=reasoning-gym:countdown"], "is no task that is taken here"),
        (["data.dataset={folder}/none.jsonl"], "does not exist"),
        (["data.dataset={folder}/p.jsonl", "data.question_column=q"], "no column 'q'; it has 'question', 'answer'"),
        (["data.dataset={folder}/p.jsonl", "data.filters.level=3"], "which data.filters names"),
        (["data.dataset={folder}/bad.jsonl"], "row 7 .*the gold answer"),
        (["data.dataset={folder}/bad.jsonl", "data.gold=boxed"], "has no \\\\boxed"),
        (["data.dataset=gsm8k", "data.directory={folder}"], "has no gsm8k_train.jsonl"),
        (["data.dataset=gsm8k", "data.decontaminate=[aime]"], "Did you mean aime24"),
        (["data.decontaminate=[open-rs]"], "has no problems to test with"),
        (["data.decontaminate=[math500]", "data.directory={folder}"], "has no math500.jsonl"),
        (["data.mixture={{owner/name: 1, '{folder}/bad.jsonl': 1}}"], "has 1 row that"),
        (["data.pass_rates={folder}/none.jsonl", "data.dataset=gsm8k"], "data.pass_rates="),
        (["data.chat_template={folder}/none.jinja"], "data.chat_template"),
        (["data.dataset={folder}/p.jsonl", "data.held_out_problems=40"], "data.held_out_problems"),
    ],
)
def test_a_wrong_data_block_is_refused_before_anything_starts(tmp_path: Path, overrides: list[str], said: str) -> None:
    write(tmp_path / "p.jsonl", *rows(10))
    write(tmp_path / "bad.jsonl", *rows(6), {"question": "Which angle?", "answer": "np.arcsin(10/13)"})
    asked = config(*(override.format(folder=tmp_path) for override in overrides), f"training.runs_dir={tmp_path}")
    with pytest.raises(UsageError, match=said) as caught:
        check_before_ray(asked, print)
    assert "\n" not in str(caught.value)


def test_what_is_on_the_hub_is_checked_by_name_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the check asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for dataset in ("gsm8k", "math", "open-s1", "open-rs", "deepscaler", "mbpp", "svamp", "owner/name:config"):
        check_dataset(config(f"data.dataset={dataset}", "data.decontaminate=[math500, gsm8k, aime24]"), print)


def test_programming_tasks_are_checked_as_programs(tmp_path: Path) -> None:
    task = {"question": "Double.", "answer": ["assert twice(1) == 2"]}
    write(tmp_path / "mbpp_train.jsonl", *({**task, "question": f"Double {i}."} for i in range(9)))
    mathematical = config("data.dataset=mbpp", f"data.directory={tmp_path}")
    programs = mathematical.model_copy(update={"rewards": Rewards(weights={"code": 1.0})})
    check_dataset(programs, print)
    with pytest.raises(UsageError, match=r"mbpp are unit tests, .* names accuracy, format. Name only code there"):
        check_dataset(mathematical, print)
    write(tmp_path / "mbpp_train.jsonl", task, {"question": "Treble.", "answer": ["assert twice(1 =="]})
    with pytest.raises(UsageError, match=r"row 2 .*is no Python program"):
        check_dataset(programs, print)
