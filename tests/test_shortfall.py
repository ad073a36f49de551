"""A placement that can never be met is named, with what is asked, what is there and the knob."""

from __future__ import annotations

import pytest

from cluster.shortfall import shortfall

FOUR_GPUS = {"a": {"CPU": 32.0, "GPU": 4.0}}
TWO_NODES = {"a": {"CPU": 16.0, "GPU": 2.0}, "b": {"CPU": 16.0, "GPU": 2.0}}


@pytest.mark.parametrize(
    ("bundles", "nodes"),
    [
        ([], {}),
        ([{"GPU": 1, "CPU": 2}] * 4, FOUR_GPUS),
        ([{"GPU": 1, "CPU": 2}] * 4, TWO_NODES),
        ([{"CPU": 4}, {"GPU": 1}, {"GPU": 2}, {"GPU": 1}], TWO_NODES),  # first fit in this order would split the two
        ([{"GPU": 1}, {"GPU": 2}], {"a": {"GPU": 2.0}, "b": {"GPU": 1.0}}),  # smallest first would take the wrong node
        ([{"GPU": 0.4}, {"GPU": 0.6}] * 4, FOUR_GPUS),
        ([{"CPU": 0.1}] * 10, {"a": {"CPU": 1.0}}),  # 10 x 0.1 is not 1.0 in floating point
    ],
)
def test_what_fits_is_no_shortfall(bundles: list[dict[str, float]], nodes: dict[str, dict[str, float]]) -> None:
    assert shortfall(bundles, nodes) is None


@pytest.mark.parametrize(
    ("bundles", "nodes", "reason"),
    [
        ([{"GPU": 1, "CPU": 2}] * 5, FOUR_GPUS, "1 GPU too few (5 asked, 4 there)"),
        ([{"GPU": 1}], {"a": {"CPU": 8.0}}, "1 GPU too few (1 asked, 0 there)"),
        ([{"GPU": 4}], TWO_NODES, "no single node has 4 GPU"),
        ([{"GPU": 1, "CPU": 20}], TWO_NODES, "no single node has 1 GPU + 20 CPU"),
        ([{"GPU": 1.5}] * 2 + [{"GPU": 1}], TWO_NODES, "not node by node"),
        ([{"CPU": 0.4}] * 3, {"a": {"CPU": 1.0}}, "0.2 CPU too few (1.2 asked, 1 there)"),
    ],
)
def test_a_shortfall_names_asked_there_and_fix(
    bundles: list[dict[str, float]], nodes: dict[str, dict[str, float]], reason: str
) -> None:
    text = shortfall(bundles, nodes, fix="Lower cluster.learner_ranks.")
    assert text is not None and reason in text
    assert text.endswith("Lower cluster.learner_ranks.") and "\n" not in text
    assert "Asked: " in text and all(f"{name}: " in text for name in nodes)


def test_equal_bundles_are_counted_together() -> None:
    text = shortfall([{"GPU": 1}] * 3 + [{"CPU": 1}], {"a": {"CPU": 4.0}})
    assert text is not None and "3 bundles of 1 GPU, a bundle of 1 CPU" in text
