"""Kills and freezes parts of whole runs at random moments of every phase: `python -m benchmarks.chaos`.

Each run suffers a few faults, one after another, and must end with the metrics and the weights, bit for bit, of the run
that was left alone. Rounds go on until every kind of fault has met every phase --each times, or --seconds are over; one
line is recorded a call, and `--table` adds up all that were recorded. --seed fixes who, when and in what order.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import RESULTS, ROOT, Spread, record
from benchmarks.prey import LEARNER, VERIFIER, WORKER, actors, await_, doing, steps_done

NAME = "chaos"
STEPS, BEAT_SECONDS, ROUND = 14, 5.0, 6
SETTINGS = (
    f"training.steps={STEPS}",
    "rollout.prompts_per_batch=8",
    "rollout.completions_per_prompt=8",
    f"cluster.heartbeat_seconds={BEAT_SECONDS}",
    "cluster.deadline_seconds=120",
    "checkpoint.every=2",
    "evaluation.every=0",
    "telemetry.live=off",
    "telemetry.tensorboard=false",
)
# What the learner is doing in a phase; sampling is what happens while it does nothing.
PHASES = {"sample": "", "update": ".update", "push": ".sync_weights"}
DRIVER, CHILD = "driver", "verifier's child"
KINDS = {
    "worker killed": (WORKER, signal.SIGKILL),
    "worker frozen": (WORKER, signal.SIGSTOP),
    "verifier killed": (VERIFIER, signal.SIGKILL),
    "verifier frozen": (VERIFIER, signal.SIGSTOP),
    "verifier's child killed": (CHILD, signal.SIGKILL),
    "verifier's child frozen": (CHILD, signal.SIGSTOP),
    "learner killed": (LEARNER, signal.SIGKILL),
    "learner frozen": (LEARNER, signal.SIGSTOP),
    "driver killed": (DRIVER, signal.SIGKILL),
}


@dataclass(frozen=True)
class Fault:
    """What was done in which phase; seconds until the victim was gone, and until the run was further than before."""

    kind: str
    phase: str
    step: int
    gone_seconds: float
    recovered_seconds: float


class Run:
    """A run that suffers. `faults` are those that it has survived."""

    def __init__(self, folder: Path, name: str, chance: random.Random) -> None:
        self.folder = folder / name
        self.faults: list[Fault] = []
        self._log = folder / f"{name}.log"
        self._chance = chance
        self._place = [f"training.runs_dir={folder}", f"model.cache_dir={folder / 'cache'}", f"training.name={name}"]
        self._process = self._start("--config", str(ROOT / "tests" / "small.yaml"), *SETTINGS, *self._place)

    def suffer(self, kind: str, phase: str) -> Fault:
        """One fault, once the run is in that phase; AssertionError if it does not get over it."""
        target, number = KINDS[kind]
        step = steps_done(self.folder)
        await_(lambda: steps_done(self.folder) > step, "a step before the fault", self._process)
        await_(lambda: self._in(phase), phase, self._process)
        if phase != "push":
            time.sleep(0.1 * self._chance.random())
        victim = self._victim(target)
        step, begun, met = steps_done(self.folder), time.monotonic(), self._phase()
        victim.send_signal(number)
        await_(lambda: doing(victim.pid) == "", "the victim's end")
        gone = time.monotonic() - begun
        if target == DRIVER:
            self._resume()
        await_(lambda: steps_done(self.folder) > step, f"a step after {kind}", self._process)
        fault = Fault(kind, met, step, gone, time.monotonic() - begun)
        self.faults.append(fault)
        return fault

    def end(self) -> None:
        """AssertionError unless it ends well."""
        code = self._process.wait(300)
        assert code == 0, f"it ended with {code}"

    def result(self) -> tuple[list[dict[str, Any]], bytes]:
        """Metrics without what hangs on the clock, and the weights at the end."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        timed = ("time/", "tokens/per_second")
        kept = [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]
        return kept, (self.folder / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors").read_bytes()

    def log(self) -> str:
        """The last of what it said."""
        return self._log.read_text()[-4000:]

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", str(ROOT / "run_local.py"), *arguments]
        with self._log.open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def _resume(self) -> None:
        self._process.wait(60)
        self._process = self._start("--resume", str(self.folder))

    def _phase(self) -> str:
        learner = [doing(process.pid) for process in actors(self._process.pid, LEARNER)]
        known = [phase for phase, task in PHASES.items() if task and any(task in each for each in learner)]
        return known[0] if known else "sample"

    def _in(self, phase: str) -> bool:
        return self._phase() == phase

    def _victim(self, target: str) -> psutil.Process:
        if target == DRIVER:
            return psutil.Process(self._process.pid)
        kind = VERIFIER if target == CHILD else target
        await_(lambda: actors(self._process.pid, kind), f"a {kind}", self._process)
        victim = self._chance.choice(actors(self._process.pid, kind))
        return victim.children()[0] if target == CHILD else victim


def classes(each: int, chance: random.Random) -> list[tuple[str, str]]:
    """Every kind of fault in every phase, so many times, in random order."""
    found = [(kind, phase) for kind in KINDS for phase in PHASES] * each
    chance.shuffle(found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=8, help="times every kind meets every phase (%(default)s)")
    parser.add_argument("--seconds", type=float, default=7200.0, help="when no new run is begun (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only print what was recorded")
    given = parser.parse_args(argv)
    if not given.table:
        with tempfile.TemporaryDirectory(prefix="pocketgrpo-chaos-") as folder:
            survived = campaign(Path(folder), given.each, given.seed, given.seconds, given.path)
        if not survived:
            return 1
    print(table(recorded(given.path)))
    return 0


def campaign(folder: Path, each: int, seed: int, seconds: float, path: Path) -> bool:
    """Runs with faults until all were met or the time is over; False, said and recorded, at the first not survived."""
    end, chance = time.monotonic() + seconds, random.Random(seed)
    alone = Run(folder, "alone", chance)
    alone.end()
    left = classes(each, chance)
    while left and time.monotonic() < end:
        number = len(left)
        todo = [left.pop() for _ in range(min(ROUND, len(left)))]
        run, failure = Run(folder, f"run_{number}", chance), None
        try:
            for kind, phase in todo:
                print(run.suffer(kind, phase), flush=True)
            run.end()
            assert run.result() == alone.result(), "it ended with other metrics or weights than the run left alone"
        except (AssertionError, subprocess.TimeoutExpired, psutil.Error) as error:
            failure = f"{type(error).__name__}: {error}"
            print(f"seed {seed}, {todo}: {failure}\n{run.log()}", file=sys.stderr, flush=True)
        run.close()
        figures = {"seed": seed, "faults": [asdict(fault) for fault in run.faults], "failure": failure}
        record(NAME, figures | {"heartbeat_seconds": BEAT_SECONDS}, path)
        if failure:
            return False
    return True


def recorded(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["name"] == NAME]


def table(runs: Iterable[dict[str, Any]]) -> str:
    """Markdown: how often each kind met each phase, and the slowest end and recovery."""
    runs = list(runs)
    faults = [Fault(**fault) for run in runs for fault in run["figures"]["faults"]]
    count = Counter((fault.kind, fault.phase) for fault in faults)
    rows = [f"| {len(faults)} faults in {len(runs)} runs | {' | '.join(PHASES)} | gone after s | further after s |"]
    rows.append("|---" * (3 + len(PHASES)) + "|")
    for kind in KINDS:
        own = [fault for fault in faults if fault.kind == kind]
        if own:
            gone = max(fault.gone_seconds for fault in own)
            further = Spread(tuple(fault.recovered_seconds for fault in own))
            met = " | ".join(str(count[kind, phase]) for phase in PHASES)
            rows.append(f"| {kind} | {met} | {gone:.1f} | {further.median:.0f}, at most {further.max:.0f} |")
    failures = [run["figures"]["failure"] for run in runs if run["figures"]["failure"]]
    return "\n".join([*rows, f"not survived: {len(failures)}", *failures])


if __name__ == "__main__":
    sys.exit(main())
