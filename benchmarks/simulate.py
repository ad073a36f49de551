"""Predicts a run's seconds from measured rates: `python -m benchmarks.simulate fit | validate | scale`.

fit: measures variants of the quickstart and what needs no run, and writes benchmarks/rates.json. Commit it: from
then on the rates are frozen.
validate: other variants, predicted and then measured; recorded, and exit code 1 if a step is off by more than 20 %.
scale: what the simulator makes of clusters of GPUs that nobody has measured here. Projections.

Rates measured on a busy machine are worth nothing: before each run, fit and validate wait until others use at most
--busy of the cores, for --patience seconds, and make it again if they use more after it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from benchmarks.harness import record
from benchmarks.simulator import calibration, projection, validation
from benchmarks.simulator.quickstart import FIXED, run, settings
from benchmarks.simulator.rates import Rates
from benchmarks.simulator.serial import serial_rates, verify_rates

NAME = "simulator"
Found = TypeVar("Found")


BUSY = 0.1
WATCHED_SECONDS = 10.0
PATIENCE_SECONDS = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "validate", "scale"))
    parser.add_argument("--busy", type=float, default=BUSY, help="share of the cores others may use (%(default)s)")
    parser.add_argument("--patience", type=float, default=PATIENCE_SECONDS, help="seconds to wait for it (%(default)s)")
    parser.add_argument("--path", type=Path, default=calibration.FILE, help="the rates (%(default)s)")
    given = parser.parse_args(argv)
    if given.what == "scale":
        return scale(given.path)
    calm = Calm(given.busy, given.patience)
    try:
        return fit(calm, given.path) if given.what == "fit" else validate(calm, given.path)
    except TooBusyError as error:
        print(error, file=sys.stderr)
        return 3


class TooBusyError(Exception):
    """The machine did not become calm in time."""


@dataclass(frozen=True)
class Calm:
    """Measures while others leave the cores alone: at most `busy` of them are in use before and after."""

    busy: float
    patience_seconds: float

    def measure(self, what: Callable[[], Found]) -> Found:
        """What it returns, from a go that others did not disturb; TooBusyError if none comes about in time."""
        end = time.monotonic() + self.patience_seconds
        while True:
            self._wait(end)
            found = what()
            time.sleep(WATCHED_SECONDS)  # what it leaves behind ends meanwhile
            if self._in_use() <= self.busy:
                return found
            print("others were at work; once more", file=sys.stderr, flush=True)

    def _wait(self, end: float) -> None:
        while (used := self._in_use()) > self.busy:
            if time.monotonic() > end:
                raise TooBusyError(f"Others use {used:.0%} of the cores, more than {self.busy:.0%}. Try later.")

    @staticmethod
    def _in_use() -> float:
        return psutil.cpu_percent(interval=WATCHED_SECONDS) / 100


def fit(calm: Calm, path: Path) -> int:
    serial = calm.measure(serial_rates)
    call = serial.pop("call")
    runs = []
    for scenario in calibration.RUNS:
        runs.append(calm.measure(partial(run, scenario)))
        changed = " ".join(setting.partition(".")[2] for setting in settings(scenario)[len(FIXED) :])
        print(f"{changed}: {phases(validation.measured(runs[-1]))}", flush=True)
    serial |= calm.measure(partial(verify_rates, runs[0].groups))
    rates = calibration.fit(runs, serial)
    calibration.freeze(rates, call, runs[0], path)
    print(rates)
    return 0


def validate(calm: Calm, path: Path) -> int:
    if not validation.committed(path):
        print(f"{path} is not there, or not as it was committed. Run fit, commit its rates, then validate them.")
        return 2
    frozen = calibration.frozen(path)
    found = {}
    for name, scenario in validation.RUNS.items():
        comparison = calm.measure(partial(validation.compare, scenario, frozen))
        found[name] = comparison.figures()
        print(f"{name}: {comparison.error:+.1%} (the machine is {comparison.slower:.2f} times as slow)", flush=True)
        print(f"  predicted {phases(comparison.predicted)}\n  measured  {phases(comparison.measured)}", flush=True)
    worst = max(abs(line["error"]) for line in found.values())
    record(NAME, {"rates": frozen.commit, "runs": found, "worst": worst})
    print(f"worst error of a step: {worst:.1%}, allowed {validation.LIMIT:.0%}")
    return int(worst > validation.LIMIT)


def scale(path: Path) -> int:
    """Only the driver's rates are measured; where none are frozen they are measured now."""
    if path.exists():
        frozen = calibration.frozen(path)
        driver, call = frozen.rates, frozen.call
    else:
        serial = serial_rates()
        call = serial.pop("call")
        driver = Rates(**serial)
    print(", ".join(f"{name} {getattr(driver, name):.3g}" for name in projection.DRIVER), f"call {call:.3g}", sep=", ")
    for line in projection.lines(driver, call):
        print(line, flush=True)
    return 0


def phases(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())


if __name__ == "__main__":
    sys.exit(main())
