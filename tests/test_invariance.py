"""Claims about benchmarks/invariance.py: what its table says, and that every combination makes the plain step."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from benchmarks.invariance import CASES, COLUMNS, measure, plain_rounding, table
from tests.plain_step import GRADIENT_LIMIT, WEIGHTS_LIMIT


def test_the_table_shows_the_worst_combination_in_the_rows_of_its_options_only() -> None:
    bad = next(case for case in CASES if case.zero == 3 and case.ranks == 2 and case.packing)
    found = {case: dict.fromkeys(COLUMNS, 1e-7) for case in CASES} | {bad: dict.fromkeys(COLUMNS, 0.5)}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(found, {"gradient": 2e-6}).splitlines()]
    assert {len(row) for row in rows} == {2 + len(COLUMNS)}
    cells = {row[0]: row[1:] for row in rows[2:]}
    for label, wanted in [("ZeRO 3", "5.0e-01"), ("packed", "5.0e-01"), ("ZeRO 2", "1.0e-07"), ("padded", "1.0e-07")]:
        assert cells[label][1:] == [wanted] * len(COLUMNS)
    assert cells["ZeRO 2"][0] == "48" and cells["all"][0] == "192"
    assert cells["plain transformers in float32"] == ["", "2.0e-06", "", "", "", ""]


def test_the_product_has_every_combination_once() -> None:
    combinations = [(c.zero, c.ranks, c.budget, c.packing, c.checkpointing, c.tied) for c in CASES]
    assert sorted(combinations) == sorted(product(*map(set, zip(*combinations, strict=True))))
    assert len(combinations) == 4 * 2 * 3 * 2 * 2 * 2


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_one_step_is_the_plain_step_in_every_combination(tmp_path: Path) -> None:
    found = measure(CASES, tmp_path)
    print(table(found, plain_rounding(tmp_path)))
    wrong = {
        case.name: figures
        for case, figures in found.items()
        if not (figures["gradient"] <= GRADIENT_LIMIT and figures["weights"] <= WEIGHTS_LIMIT)
    }
    assert not wrong
