"""The data side: problems, held-out sets, the sampler, prompts, and the small model's tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.arithmetic import count_distinct, generate, structured_answer, working
from data.demonstrations import with_demonstrations, work_out
from data.errors import DatasetError
from data.hashing import question_id
from data.loading import Source, load_source
from data.problems import split_held_out
from data.prompts import Template, render, render_all
from data.records import Problem, Prompt
from data.rows import refuse
from data.sampler import PromptSampler, completion_seed
from data.tokenizer import build_tokenizer

shapes = st.tuples(st.integers(2, 4), st.integers(1, 3), st.sampled_from(["+", "-", "+-", "+-*", "*"]))


def problem(question: str, answer: str = "1") -> Problem:
    return Problem(question_id(question), question, answer)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(0, problem(f"question {i}"), (i,)) for i in range(count)]


def load_problems(dataset: str, **options: Any) -> list[Problem]:
    problems, bad = load_source(Source(dataset, **options))
    refuse(dataset, bad)
    return problems


def write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@given(shape=shapes, seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_generated_answer_is_the_value_of_its_question(shape: tuple[int, int, str], seed: int) -> None:
    for made in generate(20, seed, *shape):
        assert int(made.answer) == eval(made.question)
        assert made.id == question_id(made.question)


@given(shape=shapes, seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_working_is_true_step_by_step_and_ends_in_the_answer(shape: tuple[int, int, str], seed: int) -> None:
    for made in generate(20, seed, *shape):
        steps = working(made.question)
        for chain in steps:
            for left, right in pairwise(chain.split("=")):
                total = re.match(r"-?\d+", right)
                assert total is not None and eval(left) == int(total[0])
        results = [chain.split("=")[-1] for chain in steps]
        columns = set(made.question.split()[1::2]) == {"+"} and shape[1] > 1
        digits = "".join(result[-1] for result in reversed(results[:-1])) if columns else ""
        assert results[-1] + digits == made.answer
        assert structured_answer(made).endswith(f"</think><answer>{made.answer}</answer>")


def test_a_sum_is_worked_by_columns_and_anything_else_from_left_to_right() -> None:
    assert working("47 + 38") == ["7+8=15", "4+3+1=8"]
    assert working("47 - 38") == ["47-30=17-8=9"]
    assert working("4 + 2 + 5") == ["4+2=6+5=11"]
    assert working("4 - 6 * 7") == ["6*7=42", "4-40=-36-2=-38"]


def test_generation_is_deterministic_distinct_and_a_larger_count_continues_it() -> None:
    few, many = generate(50, 3, 2, 2, "+-"), generate(200, 3, 2, 2, "+-")
    assert many[:50] == few
    assert len({made.id for made in many}) == 200
    assert generate(50, 4, 2, 2, "+-") != few


def test_a_small_space_is_used_up_exactly_and_then_refused() -> None:
    total = count_distinct(2, 1, "+")
    everything = generate(total, 0, 2, 1, "+")
    assert len({made.id for made in everything}) == total == 100
    avoid = {made.id for made in everything[:90]}
    assert {made.id for made in generate(10, 5, 2, 1, "+", avoid)} == {made.id for made in everything[90:]}
    with pytest.raises(DatasetError, match="only 10 are left"):
        generate(11, 5, 2, 1, "+", avoid)


@given(
    names=st.lists(st.integers(0, 30), min_size=8, max_size=60),
    held_out=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_no_question_is_ever_both_held_out_and_trained_on(names: list[int], held_out: int, seed: int) -> None:
    problems = [problem(f"what is  {name} ?" if i % 2 else f"what is {name} ?") for i, name in enumerate(names)]
    if len(set(names)) <= held_out:
        with pytest.raises(DatasetError, match="held_out_problems"):
            split_held_out(problems, held_out, seed)
        return
    train, kept = split_held_out(problems, held_out, seed)
    assert len(kept) == len({p.id for p in kept}) == held_out
    assert not {p.id for p in kept} & {p.id for p in train}
    assert {p.id for p in kept} | {p.id for p in train} == {p.id for p in problems}


@given(
    size=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.integers(0, 9), max_size=6),
)
@settings(max_examples=80, deadline=None)
def test_a_sampler_resumed_at_any_cursor_hands_out_the_same_prompts(size: int, seed: int, cuts: list[int]) -> None:
    whole = PromptSampler(prompts(size), seed).take(sum(cuts))
    pieces: list[Prompt] = []
    cursor = 0
    for cut in cuts:
        sampler = PromptSampler(prompts(size), seed, cursor)
        pieces += sampler.take(cut)
        cursor = sampler.cursor
    assert pieces == whole
    assert [prompt.visit for prompt in whole] == list(range(sum(cuts)))


def test_every_epoch_is_another_permutation_of_all_prompts() -> None:
    sampler = PromptSampler(prompts(50), seed=1)
    epochs = [[prompt.token_ids[0] for prompt in sampler.take(50)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sampler.epoch == 3
    assert [p.token_ids[0] for p in PromptSampler(prompts(50), seed=2).take(50)] != epochs[0]


def test_completion_seeds_are_distinct_and_fit_where_they_must() -> None:
    import torch

    seeds = {completion_seed(run, visit, index) for run in range(4) for visit in range(500) for index in range(16)}
    assert len(seeds) == 4 * 500 * 16
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    assert len({seed % 2**32 for seed in seeds}) > 31_990  # torch's CPU generator reads the low 32 bits
    torch.Generator().manual_seed(max(seeds))


def test_completion_seeds_do_not_change_between_versions() -> None:
    assert completion_seed(42, 0, 0) == 1386868241967075912  # or an old run could not be resumed


def test_jsonl_loads_with_numbers_as_text(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path / "p.jsonl", [{"q": "one?", "a": 1, "more": None}, {"q": "two?", "a": 2, "more": 3}])
    loaded = load_problems(name, question_column="q", answer_column="a")
    assert [(made.question, made.answer) for made in loaded] == [("one?", "1"), ("two?", "2")]


def test_a_demonstration_is_read_as_it_stands_and_only_where_asked_for(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path / "p.jsonl", [{"question": " a ", "answer": "1", "shown": " it is\n1 "}])
    assert [made.demonstration for made in load_problems(name)] == [None]
    (made,) = load_problems(name, demonstration_column="shown")
    assert (made.question, made.answer, made.demonstration) == ("a", "1", " it is\n1 ")


def test_a_missing_or_empty_demonstration_is_named(tmp_path: Path) -> None:
    rows: list[object] = [{"question": "a", "answer": "1", "shown": shown} for shown in ("1", " ")]
    name = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(DatasetError, match=r"row 2 \(its 'shown' is empty"):
        load_problems(name, demonstration_column="shown")
    with pytest.raises(DatasetError, match=r"no column 'show'; .*'shown'.*data\.demonstration_column"):
        load_problems(name, demonstration_column="show")


def test_a_demonstration_ends_with_eos_and_too_long_ones_are_dropped_and_counted() -> None:
    shown = ["12", "1234", "12345", ""]
    asked = [
        replace(prompt, problem=replace(prompt.problem, demonstration=text))
        for prompt, text in zip(prompts(4), shown, strict=True)
    ]
    kept, dropped = with_demonstrations(TOKENIZER, asked, 5)
    eos = TOKENIZER.eos_token_id
    assert [prompt.demonstration_ids for prompt in kept] == [
        (*TOKENIZER.encode(text), eos) for text in ("12", "1234", "")
    ]
    assert [prompt.token_ids for prompt in kept] == [(0,), (1,), (3,)] and dropped == 1
    with pytest.raises(DatasetError, match=r"All 4 demonstrations .*rollout\.max_completion_tokens=0"):
        with_demonstrations(TOKENIZER, asked, 0)


def test_a_tokenizer_without_eos_cannot_teach_where_to_stop() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DatasetError, match="no EOS token"):
        with_demonstrations(tokenizer, prompts(1), 5)


@given(shape=shapes, seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_arithmetic_is_demonstrated_by_its_working_in_the_configured_tags(
    shape: tuple[int, int, str], seed: int
) -> None:
    made = generate(5, seed, *shape)
    for plain, shown in zip(made, work_out(made, "plan", "result"), strict=True):
        text = f"<plan>{' '.join(working(plain.question))}</plan><result>{plain.answer}</result>"
        assert replace(shown, demonstration=None) == plain and shown.demonstration == text


def test_parquet_loads(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": ["a?", "b?"], "answer": ["1", "\\frac{1}{2}"]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert [made.answer for made in load_problems(str(tmp_path / "p.parquet"))] == ["1", "\\frac{1}{2}"]


@given(st.text(alphabet="0123456789+-*/=() abcXYZ.,?\n", max_size=40))
@settings(max_examples=80, deadline=None)
def test_the_tokenizer_gives_every_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_tags_are_single_tokens_that_survive_skipping_special_tokens() -> None:
    answer = structured_answer(generate(1, 0, 2, 2, "+")[0])
    token_ids = [*TOKENIZER.encode(answer), TOKENIZER.eos_token_id]
    assert TOKENIZER.decode(token_ids, skip_special_tokens=True) == answer
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert len(TOKENIZER.encode(tag)) == 1
        assert tag not in TOKENIZER.all_special_tokens


def test_the_tokenizer_is_the_same_after_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "12 + 34<think>1 2</think><answer>46</answer>"
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.decode(again.encode(text), skip_special_tokens=True) == text
    assert (again.pad_token, again.bos_token, again.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert render(again, "1 + 2", Template("Add.")) == render(TOKENIZER, "1 + 2", Template("Add."))


def test_a_prompt_has_bos_once_and_ends_where_the_assistant_begins() -> None:
    for system in (None, "Add."):
        token_ids = render(TOKENIZER, "1 + 2", Template(system, "{question} {is}?"))
        assert token_ids.count(TOKENIZER.bos_token_id) == 1
        text = TOKENIZER.decode(token_ids)
        assert text.endswith("<|user|>1 + 2 {is}?<|assistant|>")
        assert ("<|system|>Add." in text) == (system is not None)


def test_bos_is_not_doubled_for_a_tokenizer_that_adds_its_own() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert tokenizer.encode("1")[0] == tokenizer.bos_token_id  # the trap is armed
    assert render(tokenizer, "1 + 2", Template()).count(tokenizer.bos_token_id) == 1


def test_prompts_that_are_too_long_are_dropped_and_counted() -> None:
    problems = [problem("1 + 2"), problem("1" * 60), problem("3 + 4")]
    kept, dropped = render_all(TOKENIZER, problems, Template(), 10)
    assert [prompt.problem.question for prompt in kept] == ["1 + 2", "3 + 4"]
    assert dropped == 1
    assert max(len(prompt.token_ids) for prompt in kept) <= 10


def test_a_template_that_refuses_the_messages_is_a_clear_error() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(DatasetError, match=r"no system message, please.*data.system_prompt"):
        render(tokenizer, "1 + 2", Template("Add."))


TOKENIZER = build_tokenizer()
