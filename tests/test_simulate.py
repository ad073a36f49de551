"""What the simulator says where the answer is known, and that it keeps the rules of the code it stands for."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simpy import Environment, Event

from benchmarks.simulator.cores import Cores, Server, sharing
from benchmarks.simulator.lengths import LogNormal, Recorded
from benchmarks.simulator.rates import Rates
from benchmarks.simulator.scenario import Outcome, Scenario
from benchmarks.simulator.simulation import Stream, simulate
from benchmarks.simulator.worker import Worker

EVEN = LogNormal(20, 0.0, 20)
RAGGED = LogNormal(20, 0.6, 48)
SAMPLING = Rates(decode=0.01, running=0.001)
LEARNING = Rates(update=0.1, token=0.001)
BOTH = Rates(decode=0.01, running=0.001, update=0.1, token=0.001, push=0.05)


def scenario(**changes: Any) -> Scenario:
    return replace(Scenario(EVEN, prompts_per_batch=8, completions_per_prompt=4, max_running=32), **changes)


def seconds(rates: Rates, **changes: Any) -> float:
    given = scenario(**changes)
    return simulate(given, rates).step_seconds(2 + given.max_staleness)


# -- the rules ------------------------------------------------------------------------------------


def breaches(given: Scenario, outcome: Outcome) -> list[str]:
    """What is wrong with the order of training, or with how old its groups are."""
    found = []
    trained = [visit for step in outcome.steps for visit in step.visits]
    if trained != list(range(given.steps * given.prompts_per_batch)):
        found.append("not every prompt was trained on once, in order")
    if max(stale for step in outcome.steps for stale in step.staleness) > given.max_staleness:
        found.append("too stale")
    if any(stale < 0 for step in outcome.steps for stale in step.staleness):
        found.append("sampled by weights that were yet to come")
    return found


scenarios = st.builds(
    Scenario,
    lengths=st.sampled_from([EVEN, RAGGED, LogNormal(4, 1.5, 200)]),
    prompts_per_batch=st.integers(1, 9),
    completions_per_prompt=st.integers(1, 5),
    max_running=st.integers(1, 40),
    max_staleness=st.integers(0, 4),
    workers=st.integers(1, 4),
    ranks=st.integers(1, 3),
    verifiers=st.integers(1, 2),
    prompt_tokens=st.sampled_from([0.0, 30.0]),
    cores=st.sampled_from([None, 1, 2]),
    steps=st.integers(1, 8),
    seed=st.integers(0, 99),
)
second = st.sampled_from([0.0, 1e-4, 0.01, 0.3])
some_rates = st.builds(
    Rates, submit=second, decode=second, running=second, context=st.sampled_from([0.0, 1e-5]), start=second,
    hand=second, verify_group=second, step=second, update=second, token=second, push=second,
    beside=st.sampled_from([0.7, 1.0]),
)  # fmt: skip


@given(scenarios, some_rates)
@settings(max_examples=120, deadline=None)
def test_every_prompt_is_trained_on_once_in_order_and_none_is_too_stale(given: Scenario, rates: Rates) -> None:
    outcome = simulate(given, rates)
    assert breaches(given, outcome) == []
    assert all(0 <= busy <= 1 + 1e-6 for busy in outcome.busy.values())


@given(scenarios)
@settings(max_examples=60, deadline=None)
def test_however_often_workers_are_stopped_no_token_is_lost_or_decoded_twice(given: Scenario) -> None:
    given = replace(given, cores=None)
    outcome = simulate(given, Rates(running=0.01, update=0.037, push=0.003))
    decoding = outcome.busy["workers"] * given.workers * sum(step.seconds for step in outcome.steps)
    assert decoding == pytest.approx(0.01 * sum(step.tokens for step in outcome.steps))


def test_a_bound_on_staleness_is_used_up_where_sampling_is_the_faster_side() -> None:
    outcome = simulate(scenario(max_staleness=3, steps=8), replace(LEARNING, decode=1e-4))
    assert [max(step.staleness) for step in outcome.steps] == [0, 1, 2, 3, 3, 3, 3, 3]


def test_places_given_free_when_groups_are_taken_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken_is_free(stream: Stream) -> Any:
        group = stream.finished.pop(stream.cursor, None)
        if group is not None:
            stream.cursor += 1
            stream.held -= 1
        return group

    given, rates = scenario(max_staleness=1, lengths=RAGGED), replace(BOTH, token=0.01)
    assert breaches(given, simulate(given, rates)) == []
    monkeypatch.setattr(Stream, "next", taken_is_free)
    assert breaches(given, simulate(given, rates)) == ["too stale"]


def test_weights_that_workers_do_not_take_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_the_old(worker: Worker, version: int) -> None:
        worker._stop = None
        worker._wake()

    monkeypatch.setattr(Worker, "go_on", with_the_old)
    assert breaches(scenario(), simulate(scenario(), BOTH)) == ["too stale"]


# -- closed forms ---------------------------------------------------------------------------------


def test_in_turns_a_step_is_the_sum_of_its_phases() -> None:
    rates = replace(BOTH, submit=0.02, step=0.03, verify_group=0.0, start=0.004)
    sampling = 0.02 + 32 * 0.004 + 20 * (0.01 + 32 * 0.001)
    learning = 0.1 + 32 * 20 * 0.001
    assert seconds(rates) == pytest.approx(sampling + 0.03 + learning + 0.05)


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_where_one_side_takes_no_time_a_step_is_the_other(max_staleness: int) -> None:
    assert seconds(LEARNING, max_staleness=max_staleness) == pytest.approx(0.1 + 640 * 0.001)
    sampling = 20 * (0.01 + 32 * 0.001)
    assert seconds(SAMPLING, max_staleness=max_staleness, steps=20) == pytest.approx(sampling, rel=0.01)


@pytest.mark.parametrize("learner", [0.3, 1.5])
def test_at_once_a_step_is_the_slower_side_and_the_push(learner: float) -> None:
    """A batch of even completions decodes in one go, so it is sampled as a batch while the last one is learnt from."""
    sampling = 20 * (0.01 + 32 * 0.001)
    rates = replace(SAMPLING, update=learner, push=0.05)
    assert seconds(rates, max_staleness=1, steps=20) == pytest.approx(max(sampling, learner) + 0.05, rel=0.02)


def test_tokens_are_shared_out_among_ranks_and_gradients_are_not() -> None:
    one, four = (seconds(replace(LEARNING, exchange=0.2), ranks=ranks) for ranks in (1, 4))
    assert one == pytest.approx(0.1 + 0.64)
    assert four == pytest.approx(0.1 + 0.16 + 0.2 * 2 * 3 / 4)


def test_decoding_looks_back_on_more_with_every_token() -> None:
    rates = Rates(context=1e-3)
    alone = scenario(prompts_per_batch=1, completions_per_prompt=1, prompt_tokens=10.0, steps=4)
    # 20 steps that look back on 10, 11, ... tokens; by halves, since the simulated sum is an integral
    assert simulate(alone, rates).step_seconds(2) == pytest.approx(1e-3 * (20 * 10 + 20 * 20 / 2))


def test_completions_wait_where_a_worker_is_full() -> None:
    assert seconds(Rates(decode=0.01), max_running=8) == pytest.approx(4 * 20 * 0.01)


# -- what must get better, or worse ----------------------------------------------------------------


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_more_workers_sample_no_slower(max_staleness: int) -> None:
    by_workers = [
        seconds(SAMPLING, workers=workers, max_staleness=max_staleness, lengths=RAGGED, prompts_per_batch=32)
        for workers in (1, 2, 4, 8)
    ]
    assert by_workers == sorted(by_workers, reverse=True) and by_workers[-1] < 0.6 * by_workers[0]


def test_a_longer_tail_of_the_same_tokens_costs_more_in_turns_than_at_once() -> None:
    def cost(max_staleness: int) -> float:
        common = {"max_staleness": max_staleness, "max_running": 64, "steps": 16}
        tail = Recorded([[5, 5, 5, 65], [20] * 4], 100)
        return seconds(BOTH, lengths=tail, **common) / seconds(BOTH, lengths=Recorded([[20] * 4], 100), **common)

    assert cost(0) > 1.2
    assert cost(2) < cost(0)


def test_one_verifier_too_few_holds_the_run_up() -> None:
    slow = replace(BOTH, verify_group=0.5)
    assert seconds(slow, max_staleness=2) == pytest.approx(8 * 0.5, rel=0.1)
    assert seconds(slow, max_staleness=2, verifiers=8) < 0.5 * seconds(slow, max_staleness=2)


# -- shared cores ---------------------------------------------------------------------------------


def test_threads_on_shared_cores_share_them() -> None:
    environment = Environment()
    cores = Cores(environment, sharing(2, beside=0.8))
    ended: dict[str, float] = {}

    def work(name: str, seconds: float) -> Generator[Event, Any, None]:
        yield cores.start(seconds)
        ended[name] = environment.now

    for name, seconds in (("a", 1.0), ("b", 3.0), ("c", 1.0)):
        environment.process(work(name, seconds))
    environment.run()
    # three on two cores go at 0.8 x 2/3; from 1.875 s on, b is alone
    assert ended == pytest.approx({"a": 1.875, "c": 1.875, "b": 1.875 + 2.0})


def test_a_server_does_one_thing_after_another() -> None:
    environment = Environment()
    server = Server(environment, Cores(environment))
    ended: list[float] = []
    for seconds in (1.0, 2.0):
        server.do(seconds).callbacks.append(lambda _: ended.append(environment.now))
    environment.run()
    assert ended == [1.0, 3.0] and server.busy_seconds == 3.0


def test_on_two_shared_cores_two_sides_run_as_on_their_own_and_three_do_not() -> None:
    two = {"max_staleness": 1, "lengths": RAGGED}
    assert seconds(BOTH, cores=2, **two) == pytest.approx(seconds(BOTH, **two), rel=0.01)
    assert seconds(BOTH, cores=2, workers=2, **two) > 1.1 * seconds(BOTH, workers=2, **two)
