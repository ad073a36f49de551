"""On a shared GPU the two sides take turns: who sleeps and wakes, and when."""

from __future__ import annotations

from cluster.turns import Turns


class Sides:
    """Notes what is asked of rollout workers and learner, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sleep(self) -> None:
        self.asked.append("workers sleep")

    def wake_up(self, what: str) -> None:
        self.asked.append(f"workers wake {what}")

    def call(self, method: str) -> None:
        self.asked.append(f"learner {method}s")


def step(shared: bool, push: bool) -> list[str]:
    sides = Sides()
    turns = Turns(sides, sides, shared)
    turns.learning()
    if push:
        turns.pushing()
        sides.asked.append("push")
    turns.sampling()
    return sides.asked


def test_the_optimizer_leaves_before_weights_wake_and_the_cache_wakes_after_the_push() -> None:
    first = ["workers sleep", "learner wakes", "learner sleeps", "workers wake weights", "push"]
    assert step(shared=True, push=True) == [*first, "workers wake kv_cache"]


def test_without_a_push_the_workers_wake_with_the_weights_they_had() -> None:
    ends = ["workers wake weights", "workers wake kv_cache"]
    assert step(shared=True, push=False) == ["workers sleep", "learner wakes", "learner sleeps", *ends]


def test_a_run_begins_with_everyone_awake() -> None:
    sides = Sides()
    Turns(sides, sides, shared=True).sampling()
    assert sides.asked == ["learner sleeps"]


def test_with_devices_of_their_own_nobody_sleeps() -> None:
    assert step(shared=False, push=True) == ["push"]
