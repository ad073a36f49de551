"""What the simulator says where the answer is known, and that it keeps the rules of the code it stands for."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simpy import Environment, Event

from benchmarks.harness import ROOT
from benchmarks.simulate import Calm, TooBusyError
from benchmarks.simulate import main as simulate_main
from benchmarks.simulator.calibration import RUNS, Frozen, decode_steps, fit, freeze, frozen
from benchmarks.simulator.cores import Cores, Server, sharing
from benchmarks.simulator.least_squares import least_squares
from benchmarks.simulator.lengths import LogNormal, Recorded
from benchmarks.simulator.projection import Cluster, project, row
from benchmarks.simulator.quickstart import Measured, skipped
from benchmarks.simulator.rates import Rates
from benchmarks.simulator.roofline import H100, R1_QWEN_1_5B, Setup, gpu_rates
from benchmarks.simulator.scenario import Outcome, Scenario
from benchmarks.simulator.simulation import Stream, simulate
from benchmarks.simulator.validation import LIMIT, Comparison, committed, measured, predicted
from benchmarks.simulator.validation import RUNS as VALIDATED
from benchmarks.simulator.worker import Worker
from data.records import Completion, Group, Problem, Prompt

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


# -- rates ----------------------------------------------------------------------------------------

TRUE = Rates(
    submit=0.03, decode=0.012, running=2e-4, start=3e-4, step=0.02, update=0.09, token=1.1e-4, exchange=0.15,
    probe=0.04, push=0.05, push_worker=0.02, beside=0.85,
)  # fmt: skip
SERIAL = dict.fromkeys(("hand", "verify_group", "verify", "record", "record_token", "share", "share_square"), 0.0)


def as_measured(scenario: Scenario) -> Measured:
    """A simulated run in the place of a real one."""
    drawn = Recorded([LogNormal(14, 0.8, 60).draw(Random(i), 12) for i in range(40)], scenario.lengths.limit)
    given = replace(scenario, lengths=drawn, prompt_tokens=float(PROMPT))
    skip = skipped(given)
    steps = simulate(given, TRUE).steps[skip:]
    phases = [
        {"wait": s.wait, "sample": s.wait, "verify": 0.0, "update": s.update, "sync": s.sync, "step": s.seconds}
        for s in steps
    ]
    size = given.completions_per_prompt
    groups = [[group(v, drawn.draw(Random(f"{given.seed} {v}"), size)) for v in s.visits] for s in steps]
    return Measured(given, phases, groups)


PROMPT = 9


def group(visit: int, lengths: list[int]) -> Group:
    def completion(index: int, length: int) -> Completion:
        ids = np.zeros(length, np.int32)
        return Completion(index, 0, ids, ids.astype(np.float32), ids, "", "stop")

    prompt = Prompt(visit, Problem("", "", ""), (1,) * PROMPT)
    return Group(prompt, tuple(completion(i, length) for i, length in enumerate(lengths)))


def test_the_fit_finds_the_rates_that_made_the_runs() -> None:
    found = fit([as_measured(scenario) for scenario in RUNS], SERIAL)
    assert asdict(found) == pytest.approx(asdict(TRUE), rel=1e-6)


def test_rates_are_never_negative_and_small_timings_count_as_much_as_large_ones() -> None:
    rows = [[1.0, float(n)] for n in (1, 10, 100, 1000)]
    assert least_squares(rows, [0.5 * n for n in (1, 10, 100, 1000)]) == pytest.approx([0.0, 0.5], abs=1e-12)
    assert min(least_squares(rows, [1.0, 9.0, 98.0, 999.0])) >= 0.0
    fixed, each = least_squares(rows, [0.2 + 0.01 * n for n in (1, 10, 100, 1000)])
    assert (fixed, each) == pytest.approx((0.2, 0.01))
    with pytest.raises(ValueError, match="cannot tell 2 rates apart"):
        least_squares(rows[:1], [1.0])


@pytest.mark.parametrize(
    ("lengths", "max_running", "steps"), [([3, 5, 2], 3, 5), ([3, 5, 2], 1, 10), ([3, 5, 2], 2, 5)]
)
def test_decode_steps_of_a_worker_that_holds_so_many(lengths: list[int], max_running: int, steps: int) -> None:
    assert decode_steps(lengths, max_running) == steps
    alone = scenario(lengths=Recorded([lengths], 9), prompts_per_batch=1, completions_per_prompt=3, steps=1)
    alone = replace(alone, max_running=max_running)
    drawn = alone.lengths.draw(Random(f"{alone.seed} 0"), 3)
    assert simulate(alone, Rates(decode=1.0)).steps[0].wait == pytest.approx(decode_steps(drawn, max_running))


def test_frozen_rates_come_back_as_they_were(tmp_path: Path) -> None:
    run = as_measured(RUNS[0])
    freeze(TRUE, 1e-4, run, tmp_path / "rates.json")
    found = frozen(tmp_path / "rates.json")
    assert (found.rates, found.call, found.prompt_tokens) == (TRUE, 1e-4, PROMPT)
    assert found.lengths == [[len(c.token_ids) for c in group.completions] for group in run.groups]


def test_uncommitted_rates_are_not_validated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rates.json").write_text("{}")
    assert simulate_main(["validate", "--path", str(tmp_path / "rates.json")]) == 2
    assert "commit" in capsys.readouterr().out
    assert committed(ROOT / "requirements.lock") and not committed(tmp_path / "none.json")


def test_what_others_disturbed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0.9, 0.05, 0.5, 0.05, 0.05])  # waits; goes; disturbed; goes; undisturbed
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 100 * next(used))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    goes = iter(["first", "second"])
    assert Calm(0.1, 60.0).measure(lambda: next(goes)) == "second"
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 90.0)
    with pytest.raises(TooBusyError, match="90%"):
        Calm(0.1, 0.0).measure(lambda: None)


def test_a_prediction_is_of_the_frozen_lengths_and_wrong_rates_show() -> None:
    runs = [as_measured(scenario) for scenario in RUNS]
    lengths = [[len(c.token_ids) for c in group.completions] for group in runs[0].groups]
    given = VALIDATED["at once, staleness 2"]
    right = Frozen(TRUE, 0.0, PROMPT, lengths, "", {})
    wrong = Frozen(replace(TRUE, running=2 * TRUE.running, token=2 * TRUE.token), 0.0, PROMPT, lengths, "", {})
    expected = measured(as_measured(given))
    assert abs(Comparison(predicted(given, right), expected, 1.0).error) < 0.1
    assert abs(Comparison(predicted(given, wrong), expected, 1.0).error) > LIMIT


# -- projections ----------------------------------------------------------------------------------


def test_a_learning_gpu_takes_the_datasheets_time() -> None:
    rates = gpu_rates(H100, R1_QWEN_1_5B, Rates(), 0.0, Setup(8, 8, 1e6, 100.0))
    assert 1 / rates.token == pytest.approx(0.35 * 989e12 / (8 * 1.54e9))
    assert rates.decode == pytest.approx(3e-3 + 28 * 15 * 6e-6)  # launches: the weights are read in less
    across = gpu_rates(H100, R1_QWEN_1_5B, Rates(), 0.0, Setup(16, 16, 1e6, 100.0))
    assert across.push == pytest.approx(9 * rates.push), "a node's links are nine times as fast as the network"


def test_a_projection_splits_the_gpus_so_that_neither_side_idles_and_counts_the_drivers_part() -> None:
    cluster = Cluster(H100, 8, 16, 2, LogNormal(300, 0.3, 600))
    found = project(cluster, Rates(hand=0.01), 0.0)
    assert found.scenario.workers + found.scenario.ranks == 8
    assert found.free <= found.seconds
    slow = project(cluster, Rates(hand=2.0), 0.0)
    assert slow.seconds == pytest.approx(16 * 2.0, rel=0.1) and slow.free == pytest.approx(found.free)
    assert slow.outcome.busy["driver"] > 0.9
    assert row(found).startswith("| 8 H100 | 16 | 2 | ")
