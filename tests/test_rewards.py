"""Claims about the reward functions: extraction, equivalence, format, the registry."""

from __future__ import annotations

import threading
import time
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.records
import rewards
from configs.errors import UsageError
from configs.loading import load_config
from rewards.accuracy import _math_verify, _parse, compare, judge, parse_gold, score
from rewards.extraction import Answer, find_answer, last_boxed, last_number
from rewards.format import well_formed
from rewards.registry import REWARDS, Case, Judgement, Length, Tags, check_weights, reward, weigh

TAGS = Tags()


def answer_in(text: str) -> str | None:
    found = find_answer(text, TAGS)
    return None if found is None else found.text


def structured(answer: str) -> str:
    return f"<think>because</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (structured(" 12 "), "12"),
        (structured(r"so \boxed{3}"), "3"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("I get 3 + 4 = 1,234.5 apples.", "1,234.5"),
        ("12-5", "5"),
        ("it is -5", "-5"),
        ("it is \N{MINUS SIGN}5", "-5"),
        ("about 3/4", "3/4"),
        ("none", None),
        ("<answer>  </answer>", None),
        ("", None),
    ],
)
def test_the_answer_is_the_tagged_one_then_the_boxed_one_then_the_last_number(text, found):
    assert answer_in(text) == found


def test_reasoning_is_never_an_answer():
    assert answer_in("<think>7 or \\boxed{7}</think> then 8") == "8"
    assert answer_in("<think>7 or \\boxed{7}") is None
    assert answer_in("it opened in the prompt, 7</think><answer>8</answer>") == "8"


def test_strict_accuracy_counts_tagged_and_boxed_answers_only():
    weights = {"accuracy": 1.0, "accuracy_strict": 1.0}
    for text, strict in [("it is 7", 0.0), ("<answer>7</answer>", 1.0), (r"\boxed{7}", 1.0), (r"\boxed{8}", 0.0)]:
        found = score(Case(text, "7"), weights)
        assert found.rewards["accuracy_strict"] == strict
        assert found.rewards["accuracy"] == (0.0 if "8" in text else 1.0)


def test_unbalanced_boxes_hold_nothing():
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed(r"\boxed{1\}") is None


def test_extraction_is_linear_in_hostile_text():
    start = time.perf_counter()
    for piece in ("\\boxed{", "<answer>", "<think>", "1,111", "7", "-", "{", "\\", "1/"):
        find_answer(piece * (1_000_000 // len(piece)), TAGS)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5"),
        ("5", "+05"),
        ("0.5", r"\frac{1}{2}"),
        ("1/2", "0.5"),
        ("x + 1", "1 + x"),
        ("$x + 1$", r"$1+x$"),
        ("1234", "1,234"),
        ("5", "x = 5"),
        ("10", r"\$10"),
        ("2", "1 +\n 1"),
        ("1.77e-6", r"1.77 \times 10^{-6}"),
        ("7", "the sum is 7"),
        ("no solution", "no solution"),
        (r"\text{Evelyn}", "Evelyn"),
    ],
)
def test_equal_answers_are_correct(gold, answer):
    assert compare(gold, answer) == "correct"


@pytest.mark.parametrize(
    ("gold", "answer"), [("5", "6"), ("7", "5, 6, 7"), ("7", "7 or 8"), ("no solution", "one solution")]
)
def test_other_answers_and_hedges_are_wrong(gold, answer):
    assert compare(gold, answer) == "wrong"


@pytest.mark.parametrize("answer", [r"\frac{1}{", ")(", "?", "1" * 3000, "1+" * 500_000 + "1"])
def test_what_is_no_mathematics_or_too_long_is_unparsable(answer):
    assert compare("5", answer) == "unparsable"


def test_the_gold_answer_is_the_first_argument():
    assert compare(gold="1 < x < 2", answer="(1, 2)") == "correct"
    assert compare(gold="(1, 2)", answer="1 < x < 2") == "wrong"


@settings(max_examples=60, deadline=None)
@given(st.integers(-1200, 1200), st.integers(-1200, 1200), st.sampled_from(["{}", "{:+}", "{:06}"]))
def test_the_fast_path_for_integers_agrees_with_math_verify(gold, answer, style):
    for given_answer in (style.format(answer), style.format(gold)):
        slow = _math_verify().verify(list(_parse(str(gold))), list(_parse(given_answer)), timeout_seconds=None)
        assert (compare(str(gold), given_answer) == "correct") == slow


@pytest.mark.parametrize("gold", ["", "   ", r"\frac{1}{", "?!", "1" * 3000, "{" * 300 + "1" + "}" * 300])
def test_a_gold_answer_that_cannot_be_parsed_is_refused_by_name(gold):
    with pytest.raises(ValueError, match="cannot be parsed") as refused:
        parse_gold(gold)
    assert repr(gold[:80])[:-1] in str(refused.value)


@pytest.mark.parametrize("gold", ["42", "-3.5", "1.77e-6", r"\frac{2}{1005}", r"\$18.90", "(1,7), (3, 5)", "x=5"])
def test_usual_gold_answers_parse_and_equal_themselves(gold):
    assert parse_gold(gold)
    assert compare(gold, gold) == "correct"


def test_judging_works_off_the_main_thread():
    """math-verify's own time-out raises there, and callers that swallow it score everything 0."""
    outcomes: list[str] = []
    text = structured(r"\frac{2}{4}")
    thread = threading.Thread(target=lambda: outcomes.append(judge(Case(text, r"\frac{1}{2}")).outcome))
    thread.start()
    thread.join()
    assert outcomes == ["correct"]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (" \n<think>a\nb</think>\n\n<answer>c</answer>\n", True),
        ("<think></think><answer></answer>", True),
        ("<think>a</think>b<answer>c</answer>", False),
        ("x<think>a</think><answer>c</answer>", False),
        ("<think>a</think><answer>c</answer>x", False),
        ("<answer>c</answer><think>a</think>", False),
        ("<think>a<answer>b</think></answer>", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False),
        ("<think>a<think></think><answer>b</answer>", False),
        ("</think>a<think><answer>b</answer>", False),
        ("<answer>b</answer>", False),
        ("", False),
    ],
)
def test_format_wants_each_tag_once_in_order_and_nothing_outside(text, fits):
    assert well_formed(text, TAGS) is fits


def test_the_tags_are_configurable():
    tags = Tags("plan", "result")
    text = "<plan>p</plan><result>7</result>"
    assert well_formed(text, tags)
    assert not well_formed(text, TAGS)
    assert find_answer(text, tags) == Answer("7", marked=True)


PIECES = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", " ", "7", "-", "\x00", "\ud800")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12).map("".join))
def test_format_is_zero_or_one_and_extraction_never_raises_whatever_the_text(text):
    assert REWARDS["format"](Case(text, "7"), Judgement("wrong", None)) in (0.0, 1.0)
    found = answer_in(text)
    assert found is None or found.strip() == found != ""
    last_number(text)


def test_a_score_is_the_weighted_sum_of_the_rewards():
    found = score(Case(structured("7"), "7"), {"accuracy": 1.0, "format": 0.25})
    assert found.rewards == {"accuracy": 1.0, "format": 1.0}
    assert (found.total, found.outcome, found.extracted) == (1.25, "correct", "7")


def test_every_completion_has_an_outcome_even_if_only_format_is_rewarded():
    found = score(Case(structured("8"), "7"), {"format": 1.0})
    assert (found.total, found.outcome, found.rewards) == (1.0, "wrong", {"format": 1.0})


@pytest.mark.parametrize("outcome", ["wrong", "unparsable", "timeout", "error"])
def test_accuracy_rewards_nothing_but_correct(outcome):
    assert weigh(Case("", "7"), Judgement(outcome, None), {"accuracy": 1.0}).total == 0.0


def test_an_unknown_reward_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        check_weights({"acuracy": 1.0})


def test_a_reward_name_is_taken_once():
    with pytest.raises(ValueError, match="registered already"):
        reward("accuracy")(lambda case, judgement: 0.0)


def test_outcomes_are_those_of_the_records():
    assert typing.get_args(rewards.Outcome) == data.records.OUTCOMES


def overlong(tokens: int, limit: int, buffer: int) -> float:
    return REWARDS["overlong"](Case("", "7", length=Length(tokens, limit, buffer)), Judgement("correct", "7"))


limits = st.integers(2, 300).flatmap(lambda limit: st.tuples(st.just(limit), st.integers(1, limit - 1)))


@settings(max_examples=200, deadline=None)
@given(limits)
def test_overlong_is_zero_up_to_the_buffer_and_falls_evenly_to_minus_one_at_the_limit(limit):
    longest, buffer = limit
    free = longest - buffer
    values = [overlong(tokens, longest, buffer) for tokens in range(longest + 1)]
    assert set(values[: free + 1]) == {0.0}
    assert values[free + 1] == pytest.approx(-1 / buffer) and values[longest] == -1.0
    falls = [before - after for before, after in zip(values[free:-1], values[free + 1 :], strict=True)]
    assert falls == pytest.approx([1 / buffer] * buffer)
    assert overlong(longest + 1, longest, buffer) == -1.0


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0.0), (16_383, 0.0), (16_384, 0.0), (18_432, -0.5), (20_480, -1.0), (30_000, -1.0)]
)
def test_overlong_has_the_values_of_the_papers_own_limits(tokens, value):
    assert str(overlong(tokens, 20_480, 4_096)) == str(value), "and no -0.0 that would look like a penalty"


def test_overlong_is_weighed_beside_the_other_rewards_and_refuses_an_unknown_length():
    weights = {"accuracy": 1.0, "overlong": 0.5}
    case = Case("7", "7", length=Length(tokens=30, limit=32, buffer=8))
    found = score(case, weights)
    assert found.rewards == {"accuracy": 1.0, "overlong": -0.75} and found.total == 0.625
    with pytest.raises(ValueError, match="length in tokens"):
        score(Case("7", "7"), weights)


def test_the_overlong_buffer_must_leave_room_and_is_idle_without_its_reward():
    rewarded = "rewards.weights.overlong=0.5"
    assert load_config(None, [rewarded, "rewards.overlong_buffer=31"]).rewards.overlong_buffer == 31
    with pytest.raises(UsageError, match=r"overlong_buffer=32 .*max_completion_tokens=32"):
        load_config(None, [rewarded, "rewards.overlong_buffer=32"])
    with pytest.raises(UsageError, match=r"overlong_buffer=4 would have no effect"):
        load_config(None, ["rewards.overlong_buffer=4"])
    load_config(None, ["rollout.max_completion_tokens=4"])  # nobody asks for the buffer
