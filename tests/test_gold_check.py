"""Gold answers are read as hostile text: in a child, with a limit, and by the judge that will compare with them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from rewards.gold_check import GoldCheck, SlowGoldsError, gold_check
from tests.processes import title

EXPLODES = r"\binom{1000000000}{500000000}"  # one call into C that would run for years, deaf to Ctrl-C
SECONDS = 3.0


@pytest.fixture(scope="module")
def check() -> Iterator[GoldCheck]:
    with gold_check("math", SECONDS) as ready:
        ready(r"\frac{1}{2}")
        yield ready


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "rewards.child" in title(child)]


def test_plain_numbers_need_no_child_and_none_is_left() -> None:
    before = children()
    with gold_check("math") as ready:
        for gold in ("42", "-3.5", "1,234", "1.77e-6", "50%", "(B)"):
            ready(gold)
        assert children() == before
        ready(r"\sqrt{2}")
        assert len(children()) == len(before) + 1
    assert children() == before


@pytest.mark.parametrize("gold", ["(1,7), (3, 5)", r"\frac{2}{1005}", "x=5", r"\$18.90", r"2\sqrt{3} + \pi"])
def test_what_can_be_scored_is_taken(check: GoldCheck, gold: str) -> None:
    check(gold)


@pytest.mark.parametrize("gold", ["", r"\frac{1}{", "?!", "1" * 3000, "{" * 300 + "1" + "}" * 300])
def test_what_cannot_be_scored_is_refused_by_name(check: GoldCheck, gold: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be parsed: expected a number or LaTeX") as refused:
        check(gold)
    assert repr(gold[:80])[:-1] in str(refused.value)


@pytest.mark.faults
def test_one_that_explodes_costs_its_time_limit_and_the_next_is_read(check: GoldCheck) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"'\\\\binom.*' takes more than 3 s to parse.*drop it"):
        check(EXPLODES)
    assert time.monotonic() - begun < SECONDS + 5.0
    check(r"\sqrt{2}")


def test_so_many_that_explode_are_not_all_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.gold_check.MAX_SLOW", 2)
    with gold_check("math", 0.3) as ready:
        with pytest.raises(ValueError, match="takes more than"):
            ready(EXPLODES)
        with pytest.raises(SlowGoldsError, match=r"2 gold answers take too long, the last: .*binom"):
            ready(EXPLODES + "+1")


def test_no_child_is_an_error_that_says_so() -> None:
    with gold_check("math", memory_mb=1) as ready, pytest.raises(RuntimeError, match=r"did not start.*memory_mb"):
        ready(r"\sqrt{2}")
