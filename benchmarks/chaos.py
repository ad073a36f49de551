"""Kills and freezes parts of whole runs at random moments of every phase: `python -m benchmarks.chaos`.

Each run suffers a few faults, one after another, and must end with the metrics and the weights, bit for bit, of the run
that was left alone. They go on until every kind of fault has met every phase --each times, together with the runs on
record, or --seconds are over. A run is a line on record, and `--table` adds them up. --seed fixes who, when and in
what order. Two calls may share the work, each with its own --kinds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from benchmarks.harness import RESULTS, ROOT, Spread, record
from benchmarks.made_cluster import add, made_cluster, raylet
from benchmarks.prey import LEARNER, VERIFIER, WORKER, actors, await_, doing, steps_done

NAME = "chaos"
STEPS, BEAT_SECONDS, ROUND = 40, 5.0, 12
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
DRIVER, CHILD, NODE = "driver", "verifier's child", "node"
GONE_SECONDS = 2 * BEAT_SECONDS  # to be found, and killed
FROZEN_SECONDS = 8.0  # of a driver, which nobody watches: it is let go again
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
    "driver frozen": (DRIVER, signal.SIGSTOP),
    "node lost": (NODE, signal.SIGKILL),
}

# Metrics of each step and, at the end, the weights.
Result = tuple[list[dict[str, Any]], bytes]


@dataclass(frozen=True)
class Fault:
    """What was done in which phase; seconds until the victim was gone, and until the run was further than before."""

    kind: str
    phase: str
    step: int
    gone_seconds: float
    recovered_seconds: float


class Run:
    """A run that suffers, in a Ray of its own or in a cluster. `faults` are those that it has survived."""

    def __init__(self, folder: Path, name: str, chance: random.Random, cluster: Cluster | None = None) -> None:
        self.folder = folder / name
        self.faults: list[Fault] = []
        self._cluster = cluster
        self._log = folder / f"{name}.log"
        self._chance = chance
        self._place = [f"training.runs_dir={folder}", f"model.cache_dir={folder / 'cache'}", f"training.name={name}"]
        self._process = self._start("--config", str(ROOT / "tests" / "small.yaml"), *SETTINGS, *self._place)

    def suffer(self, kind: str, phase: str) -> Fault:
        """One fault, once the run is in that phase; AssertionError if it does not get over it."""
        target, number = KINDS[kind]
        if target == DRIVER:
            saved = self.folder / "checkpoints"
            await_(lambda: any(saved.glob("*/manifest.json")), "a checkpoint to resume from", self._process)
        step = steps_done(self.folder)
        await_(lambda: steps_done(self.folder) > step, "a step before the fault", self._process)
        victim, learner = self._victim(target), self._victim(LEARNER)
        await_(lambda: phase_of(learner) == phase, phase, self._process)
        if phase != "push":
            time.sleep(0.1 * self._chance.random())
        step, begun, met = steps_done(self.folder), time.monotonic(), phase_of(learner)
        if target == NODE:
            self._lose_node_of(victim)
        else:
            victim.send_signal(number)
        if (target, number) == (DRIVER, signal.SIGSTOP):
            time.sleep(FROZEN_SECONDS)
            victim.send_signal(signal.SIGCONT)
        else:
            await_(lambda: doing(victim.pid) == "", "the victim's end")
        gone = time.monotonic() - begun
        assert gone <= GONE_SECONDS, f"{kind}: gone after {gone:.1f} s, which is more than two heartbeats"
        if (target, number) == (DRIVER, signal.SIGKILL):
            self._resume()
        await_(lambda: steps_done(self.folder) > step, f"a step after {kind}", self._process)
        fault = Fault(kind, met, step, gone, time.monotonic() - begun)
        self.faults.append(fault)
        return fault

    def end(self) -> None:
        """AssertionError unless it ends well."""
        code = self._process.wait(300)
        assert code == 0, f"it ended with {code}"

    def result(self) -> Result:
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
        where = {"RAY_ADDRESS": self._cluster.address} if self._cluster else {}
        with self._log.open("a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, text=True, env=os.environ | where, start_new_session=True
            )

    def _resume(self) -> None:
        self._process.wait(60)
        self._process = self._start("--resume", str(self.folder))

    def _victim(self, target: str) -> psutil.Process:
        if target == DRIVER:
            return psutil.Process(self._process.pid)
        kinds = {CHILD: (VERIFIER,), NODE: (WORKER, LEARNER)}.get(target, (target,))
        await_(lambda: self._actors(*kinds), f"a {target}", self._process)
        victim = self._chance.choice(self._actors(*kinds))
        return victim.children()[0] if target == CHILD else victim

    def _actors(self, *kinds: str) -> list[psutil.Process]:
        roots = [raylet(node) for node in self._cluster.list_all_nodes()] if self._cluster else [self._process.pid]
        return [actor for root in roots for actor in actors(root, *kinds)]

    def _lose_node_of(self, victim: psutil.Process) -> None:
        """The victim's node goes without a word, and an empty one comes."""
        assert self._cluster is not None
        (node,) = [node for node in self._cluster.worker_nodes if victim in actors(raylet(node), WORKER, LEARNER)]
        self._cluster.remove_node(node, allow_graceful=False)
        add(self._cluster, num_cpus=1)


def difference(run: Result, alone: Result) -> str:
    """What differs, with the first step where it does; nothing if they are the same."""
    (lines, weights), (lines_alone, weights_alone) = run, alone
    none: dict[str, Any] = {}
    for mine, other in zip_longest(lines, lines_alone, fillvalue=none):
        names = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
        if names:
            values = [f"{name} {mine.get(name)}, not {other.get(name)}" for name in names]
            return f"step {mine.get('step')}: {'; '.join(values)}"
    return "" if weights == weights_alone else "weights"


def phase_of(learner: psutil.Process) -> str:
    """The phase of a step, by what the learner is doing. Only one file is read, as a push is soon over."""
    task = doing(learner.pid)
    known = [phase for phase, part in PHASES.items() if part and part in task]
    return known[0] if known else "sample"


def still_missing(kinds: Sequence[str], each: int, met: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(kind, phase) for kind in kinds for phase in PHASES for _ in range(each - met[kind, phase])]


def next_round(
    kinds: Sequence[str], each: int, met: Counter[tuple[str, str]], chance: random.Random
) -> list[tuple[str, str]]:
    """What the next run suffers, in random order, out of what is still missing; empty if nothing is. Losses of nodes
    have runs of their own, in a cluster."""
    missing = still_missing(kinds, each, met)
    if not missing:
        return []
    of_nodes = KINDS[chance.choice(missing)[0]][0] == NODE
    alike = [(kind, phase) for kind, phase in missing if (KINDS[kind][0] == NODE) == of_nodes]
    return chance.sample(alike, min(ROUND, len(alike)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--each", type=int, default=15, help="times every kind meets every phase, with those on record (%(default)s)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="only these (all)"
    )
    parser.add_argument("--seconds", type=float, default=7200.0, help="when no new run is begun (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only print what was recorded")
    given = parser.parse_args(argv)
    if not given.table:
        with tempfile.TemporaryDirectory(prefix="pocketgrpo-chaos-") as folder:
            survived = campaign(Path(folder), given)
        if not survived:
            return 1
    print(table(recorded(given.path)))
    return 0


def campaign(folder: Path, given: argparse.Namespace) -> bool:
    """Runs with faults until all were met or the time is over; False, said and recorded, at the first not survived."""
    end, chance = time.monotonic() + given.seconds, random.Random(given.seed)
    met = counted(run for run in recorded(given.path) if not run["figures"]["failure"])
    missing = still_missing(given.kinds, given.each, met)
    print(f"seed {given.seed}: {len(missing)} faults beside those on record", flush=True)
    if not missing:
        print("Nothing is run: a greater --each asks for more, --path FILE begins a record of its own.")
        return True
    alone = Run(folder, "alone", chance)
    alone.end()
    number = 0
    while time.monotonic() < end and (todo := next_round(given.kinds, given.each, met, chance)):
        number += 1
        with cluster_for(todo) as cluster:
            run, failure = Run(folder, f"run_{number}", chance, cluster), None
            try:
                for kind, phase in todo:
                    print(run.suffer(kind, phase), flush=True)
                run.end()
                other = difference(run.result(), alone.result())
                assert not other, f"it ended otherwise than the run left alone: {other}"
            except (AssertionError, subprocess.TimeoutExpired, psutil.Error) as error:
                failure = f"{type(error).__name__}: {error}"
                print(f"seed {given.seed}, {todo}: {failure}\n{run.log()}", file=sys.stderr, flush=True)
            run.close()
        figures = {"seed": given.seed, "faults": [asdict(fault) for fault in run.faults], "failure": failure}
        record(NAME, figures | {"heartbeat_seconds": BEAT_SECONDS}, given.path)
        if failure:
            return False
        met.update((fault.kind, fault.phase) for fault in run.faults)
    return True


@contextmanager
def cluster_for(todo: Sequence[tuple[str, str]]) -> Iterator[Cluster | None]:
    """Where nodes are to be lost: a head that takes no work, two nodes of one CPU for a run, and a spare one."""
    if KINDS[todo[0][0]][0] != NODE:
        yield None
        return
    with made_cluster() as cluster:
        for _ in range(3):
            add(cluster, num_cpus=1)
        yield cluster


def recorded(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["name"] == NAME]


def counted(runs: Iterable[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """How often each kind of fault met each phase."""
    return Counter((fault["kind"], fault["phase"]) for run in runs for fault in run["figures"]["faults"])


def table(runs: Iterable[dict[str, Any]]) -> str:
    """Markdown: how often each kind met each phase, and the slowest end and recovery."""
    runs = list(runs)
    faults = [Fault(**fault) for run in runs for fault in run["figures"]["faults"]]
    count = counted(runs)
    columns = [f"{len(faults)} faults in {len(runs)} runs", *PHASES, "gone after s, at most", "further after s"]
    rows = [f"| {' | '.join(columns)} |"]
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
