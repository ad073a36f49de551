"""The learning rate of every optimizer step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from configs.schema import Learner
from learner.schedule import learning_rate, warmup_updates


def rates(total: int, **options: object) -> list[float]:
    learner = Learner.model_validate({"learning_rate": 0.2, **options})
    return [learning_rate(learner, update, total) for update in range(total + 3)]


def test_a_constant_rate_is_kept() -> None:
    assert rates(5) == [0.2] * 8


def test_a_linear_rate_falls_evenly_to_the_floor_and_stays_there() -> None:
    values = rates(10, schedule="linear", min_learning_rate_ratio=0.1)
    assert values[0] == 0.2
    assert np.diff(values[:11]) == pytest.approx([-0.018] * 10)
    assert values[10:] == pytest.approx([0.02] * 3)


def test_a_cosine_rate_falls_over_half_a_wave_to_the_floor() -> None:
    values = rates(10, schedule="cosine", min_learning_rate_ratio=0.25)
    assert values[0] == 0.2
    assert values[5] == pytest.approx(0.2 * (0.25 + 0.75 / 2))
    assert values[10:] == pytest.approx([0.05] * 3)
    assert all(after < before for before, after in pairwise(values[:11]))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [4, 0.4])
def test_the_warm_up_rises_evenly_by_steps_or_share_and_ends_at_the_peak(schedule: str, warmup: float) -> None:
    values = rates(10, schedule=schedule, warmup=warmup)
    assert values[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert values[4] == pytest.approx(0.2)  # the schedule starts at the peak
    assert values[10] == pytest.approx(0.2 if schedule == "constant" else 0.0)


def test_a_warm_up_of_one_is_one_step_and_one_as_long_as_the_run_ends_at_the_peak() -> None:
    assert warmup_updates(1.0, 10) == 1
    assert warmup_updates(0.04, 10) == 0
    assert rates(4, warmup=4, schedule="cosine")[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
