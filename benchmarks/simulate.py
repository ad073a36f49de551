"""Predicts a run's seconds from measured rates: `python -m benchmarks.simulate fit | validate | scale`.

fit: measures variants of the quickstart and what needs no run, and writes benchmarks/rates.json. Commit it: from
then on the rates are frozen.
validate: other variants, predicted and then measured; recorded, and exit code 1 if a step is off by more than 20 %.
scale: what the simulator makes of clusters of GPUs that nobody has measured here. Projections.

Rates measured on a busy machine are worth nothing: before each run, fit and validate wait until the load is below
--load, for --patience seconds at most.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import record
from benchmarks.simulator import calibration, projection, validation
from benchmarks.simulator.quickstart import FIXED, run, settings
from benchmarks.simulator.rates import Rates
from benchmarks.simulator.serial import serial_rates, verify_rates

NAME = "simulator"


LOAD = 2.5  # of the last minute; a run that has just ended here leaves about 2
PATIENCE_SECONDS = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "validate", "scale"))
    parser.add_argument("--load", type=float, default=LOAD, help="highest load that is measured under (%(default)s)")
    parser.add_argument("--patience", type=float, default=PATIENCE_SECONDS, help="seconds to wait for it (%(default)s)")
    parser.add_argument("--path", type=Path, default=calibration.FILE, help="the rates (%(default)s)")
    given = parser.parse_args(argv)
    if given.what == "scale":
        return scale(given.path)
    calm = Calm(given.load, given.patience)
    try:
        return fit(calm, given.path) if given.what == "fit" else validate(calm, given.path)
    except TooBusy as error:
        print(error, file=sys.stderr)
        return 3


class TooBusy(Exception):
    """The machine did not become calm in time."""


@dataclass(frozen=True)
class Calm:
    """Waits for a load that can be measured under."""

    load: float
    patience_seconds: float

    def wait(self) -> float:
        """The load of the last minute, once it is below; TooBusy after a while."""
        end = time.monotonic() + self.patience_seconds
        while (load := os.getloadavg()[0]) > self.load:
            if time.monotonic() > end:
                raise TooBusy(
                    f"The load is {load:.1f} and did not fall below {self.load:g}. Try again, or raise --load."
                )
            time.sleep(5)
        return load


def fit(calm: Calm, path: Path) -> int:
    calm.wait()
    serial = serial_rates()
    call = serial.pop("call")
    runs, loads = [], []
    for scenario in calibration.RUNS:
        loads.append(calm.wait())
        runs.append(run(scenario))
        changed = " ".join(setting.partition(".")[2] for setting in settings(scenario)[len(FIXED) :])
        print(f"load {loads[-1]:.1f}, {changed}: {phases(validation.measured(runs[-1]))}", flush=True)
    rates = calibration.fit(runs, serial | verify_rates(runs[0].groups))
    calibration.freeze(rates, call, runs[0], loads, path)
    print(rates)
    return 0


def validate(calm: Calm, path: Path) -> int:
    if not validation.committed(path):
        print(f"{path} is not there, or not as it was committed. Run fit, commit its rates, then validate them.")
        return 2
    frozen = calibration.frozen(path)
    found = {}
    for name, scenario in validation.RUNS.items():
        load = calm.wait()
        comparison = validation.compare(scenario, frozen)
        found[name] = {**comparison.figures(), "load": load}
        print(f"{name}: {comparison.error:+.1%}, load {load:.1f}", flush=True)
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
    for line in projection.lines(driver, call):
        print(line, flush=True)
    return 0


def phases(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())


if __name__ == "__main__":
    sys.exit(main())
