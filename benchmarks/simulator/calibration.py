"""Rates fitted to calibration runs of the quickstart, and the file they are frozen in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heappush, heapreplace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import commit, hardware
from benchmarks.simulator.least_squares import least_squares
from benchmarks.simulator.lengths import Recorded
from benchmarks.simulator.quickstart import Measured, Phases, lengths, whole_tokens
from benchmarks.simulator.rates import Rates
from benchmarks.simulator.scenario import Scenario
from data.records import Group

FILE = Path(__file__).resolve().parent.parent / "rates.json"
CORES = 2
LIMIT = 32


def variant(prompts: int, completions: int, limit: int = LIMIT, **options: Any) -> Scenario:
    return Scenario(Recorded((), limit), prompts, completions, cores=CORES, **options)


# Unlike in everything that the rates are to tell apart: decode steps, tokens, completions, groups; workers and ranks.
RUNS = (
    variant(32, 8),
    variant(48, 8, max_running=48),
    variant(64, 4, limit=6),
    variant(24, 12, limit=16, ranks=2),
    variant(40, 4, max_running=32, workers=2),
    variant(32, 8, max_running=32, max_staleness=1),  # few at a time, so that there is always sampling beside learning
    variant(16, 8, limit=16, max_running=24, max_staleness=1),
)


@dataclass(frozen=True)
class Frozen:
    """Rates with the lengths they were measured with (by group, up to LIMIT), and where they come from."""

    rates: Rates
    call: float
    prompt_tokens: float
    lengths: list[list[int]]
    commit: str
    hardware: dict[str, Any]


def fit(runs: Sequence[Measured], serial: dict[str, float]) -> Rates:
    """The rates of these runs. serial: those that need none (`serial_rates` and `verify_rates`)."""
    turns = [run for run in runs if not run.scenario.max_staleness]
    plain = [run for run in turns if run.scenario.workers == run.scenario.ranks == 1]
    submit, decode, running, start = _sampling(plain)
    rates = Rates(submit=submit, decode=decode, running=running, start=start, **serial)
    update, token = _update(plain, rates)
    rates = replace(rates, step=_step(turns, rates), update=update, token=token)
    probe, beside = _beside([run for run in runs if run.scenario.max_staleness], rates)
    rates = replace(rates, probe=probe, beside=beside)
    push, to_two = (_push([run for run in turns if run.scenario.workers == workers]) for workers in (1, 2))
    exchange = _exchange([run for run in turns if run.scenario.ranks == 2], rates)
    return replace(rates, exchange=exchange, push=push, push_worker=max(0.0, to_two - push))


def _sampling(runs: Sequence[Measured]) -> list[float]:
    """submit, decode, running, start: from `time/sample` of the steps of one worker."""
    rows, seconds = [], []
    for run, times, groups in steps_of(runs):
        drawn = [length for group in lengths(groups) for length in group]
        steps = decode_steps(drawn, run.scenario.max_running)
        rows.append([1.0, float(steps), float(sum(drawn)), float(len(drawn))])
        seconds.append(times["sample"])
    return least_squares(rows, seconds)


def steps_of(runs: Sequence[Measured]) -> Iterator[tuple[Measured, Phases, list[Group]]]:
    return ((run, times, groups) for run in runs for times, groups in zip(run.phases, run.steps, strict=True))


def decode_steps(drawn: Sequence[int], max_running: int) -> int:
    """Decode steps of a worker for completions of these lengths, so many at a time, begun in this order."""
    ends: list[int] = []
    for length in drawn:
        if len(ends) < max_running:
            heappush(ends, length)
        else:
            heapreplace(ends, ends[0] + length)
    return max(ends)


def _update(runs: Sequence[Measured], rates: Rates) -> list[float]:
    """update, token: from `time/update` of one rank, less what cutting the batch takes of it."""
    rows = [[1.0, float(whole_tokens(groups))] for _, _, groups in steps_of(runs)]
    return least_squares(rows, [times["update"] - _cutting(run, rates) for run, times, _ in steps_of(runs)])


def _cutting(run: Measured, rates: Rates) -> float:
    completions = _completions(run.scenario)
    return rates.share * completions + rates.share_square * completions**2


def _completions(scenario: Scenario) -> int:
    return scenario.prompts_per_batch * scenario.completions_per_prompt


def _alone(run: Measured, groups: list[Group], rates: Rates) -> float:
    """An update's seconds with nothing beside it, but for what ranks exchange."""
    return rates.update + _cutting(run, rates) + rates.token * whole_tokens(groups) / run.scenario.ranks


def _beside(runs: Sequence[Measured], rates: Rates) -> tuple[float, float]:
    """probe and beside: an update with sampling beside it takes (probe + what it takes alone) / beside."""
    ends = [-run.scenario.max_staleness for run in runs]  # beside the last steps nothing is sampled any more
    whole = [replace(run, phases=run.phases[:end], steps=run.steps[:end]) for run, end in zip(runs, ends, strict=True)]
    rows = [[1.0, _alone(run, groups, rates)] for run, _, groups in steps_of(whole)]
    fixed, slower = least_squares(rows, [times["update"] for _, times, _ in steps_of(whole)])
    beside = min(1.0, 1.0 / slower) if slower else 1.0
    return fixed * beside, beside


def _exchange(runs: Sequence[Measured], rates: Rates) -> float:
    """exchange: what two ranks, each beside the other, take longer than a half of the work."""
    return max(
        0.0, median(t["update"] * rates.beside - _alone(run, groups, rates) for run, t, groups in steps_of(runs))
    )


def _push(runs: Sequence[Measured]) -> float:
    return median(times["sync"] for _, times, _ in steps_of(runs))


def _step(runs: Sequence[Measured], rates: Rates) -> float:
    """step: what of one is neither waiting, learning nor pushing, less what records take."""

    def left(run: Measured, times: Phases, groups: list[Group]) -> float:
        tokens = sum(sum(group) for group in lengths(groups))
        explained = rates.record * _completions(run.scenario) + rates.record_token * tokens
        return times["step"] - times["wait"] - times["update"] - times["sync"] - explained

    return max(0.0, median(left(*step) for step in steps_of(runs)))


def freeze(rates: Rates, call: float, run: Measured, path: Path) -> None:
    """Write them down with the lengths of a run that was cut at LIMIT."""
    groups = run.groups
    prompt = sum(len(group.prompt.token_ids) for group in groups) / len(groups)
    text = {
        "commit": commit()["hash"],
        "hardware": hardware(),
        "prompt_tokens": prompt,
        "rates": asdict(rates),
        "call": call,
        "lengths": lengths(groups),
    }
    path.write_text(json.dumps(text) + "\n")


def frozen(path: Path) -> Frozen:
    """What `freeze` wrote. FileNotFoundError if nothing has been fitted."""
    text = json.loads(path.read_text())
    return Frozen(
        Rates(**text["rates"]), text["call"], text["prompt_tokens"], text["lengths"], text["commit"], text["hardware"]
    )
