"""A long run's memory, open files and object store: `python -m benchmarks.soak [--steps 1000]`.

The quickstart with a learning rate so small that every step goes on having something to learn. Every process of the run
is looked at once in --every seconds; slopes are by least squares over the steps after the first fifth, which is
warm-up. Draws docs/soak.png, records the slopes, and ends with 1 if one is over the limit. `--table` prints what is
recorded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from benchmarks.harness import RESULTS, ROOT, record
from benchmarks.prey import doing, steps_done

NAME = "soak"
LIMIT_MB = 1.0  # of a process, per 100 steps
WARM_UP = 0.2  # share of the steps
STRETCHES = 20
PLOT = ROOT / "docs" / "soak.png"
STORE = "object store, MB"
DISCOVERY = Path("/tmp/ray/prom_metrics_service_discovery.json")

Series = dict[str, list[tuple[int, float]]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks (%(default)s)")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print what was recorded last, and run nothing")
    given = parser.parse_args(argv)
    if given.table:
        lines = map(json.loads, given.path.read_text().splitlines())
        print(table([line["figures"] for line in lines if line["name"] == NAME][-1]))
        return 0
    memory, files = watched(given.steps, given.every)
    figures = {
        "steps": given.steps,
        "megabytes": {who: summary(points, given.steps) for who, points in memory.items()},
        "open_files": {who: summary(points, given.steps) for who, points in files.items()},
    }
    record(NAME, figures, given.path)
    draw(memory, given.steps, given.plot)
    print(table(figures))
    return int(any(each["slope"] >= LIMIT_MB for each in figures["megabytes"].values()))


def watched(steps: int, every: float) -> tuple[Series, Series]:
    """Megabytes and open files of every process of a run, by what it is, at the steps at which they were looked at."""
    memory: Series = defaultdict(list)
    files: Series = defaultdict(list)
    names: dict[tuple[int, str], str] = {}
    settings = [f"training.steps={steps}", "learner.learning_rate=1e-9", "evaluation.every=0", "checkpoint.every=100"]
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-soak-") as folder:
        place = [f"training.runs_dir={folder}", "training.name=run", "telemetry.live=off"]
        command = [sys.executable, str(ROOT / "run_local.py"), "--config", "quickstart", *settings, *place]
        with (Path(folder) / "log").open("w") as log:
            run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while run.poll() is None:
            step = steps_done(Path(folder) / "run")
            for who, megabytes, opened in look(run.pid, names) if step else []:
                memory[who].append((step, megabytes))
                files[who].append((step, opened))
            if step and (used := object_store()) is not None:
                memory[STORE].append((step, used))
            time.sleep(every)
        if run.returncode != 0:
            raise RuntimeError((Path(folder) / "log").read_text()[-4000:])
    return memory, files


def look(run: int, names: dict[tuple[int, str], str]) -> list[tuple[str, float, float]]:
    """(what it is, resident MB, open files) of the run and every process under it.

    names: of the processes seen so far, by id and what they are; those alike are numbered.
    """
    found: list[tuple[str, float, float]] = []
    for process in [psutil.Process(run), *psutil.Process(run).children(recursive=True)]:
        try:
            kind = "driver" if process.pid == run else name(process)
            memory, files = process.memory_info().rss / 1e6, float(process.num_fds())
        except psutil.Error:
            continue
        alike = sum(known == kind for _, known in names) + ((process.pid, kind) not in names)
        names.setdefault((process.pid, kind), kind if alike == 1 else f"{kind} {alike}")
        found.append((names[process.pid, kind], memory, files))
    return found


def name(process: psutil.Process) -> str:
    """What a process is: an actor's class, a module, or the program."""
    title = doing(process.pid)
    if title.startswith("ray::"):
        return title.removeprefix("ray::").partition(".")[0].strip()
    line = process.cmdline()
    if "-m" in line[:3]:
        return line[line.index("-m") + 1]
    words = [Path(word).stem for word in line[:3] if not word.startswith("-")]
    return words[-1] if words and words[0].startswith("python") else (words or [process.name()])[0]


def object_store() -> float | None:
    """Megabytes of objects in Ray's store, as its metrics say; None before there are any."""
    if not DISCOVERY.exists():
        return None
    total, found = 0.0, False
    for target in json.loads(DISCOVERY.read_text())[0]["targets"]:
        try:
            text = requests.get(f"http://{target}/metrics", timeout=2).text
        except requests.RequestException:
            continue
        for line in text.splitlines():
            if line.startswith("ray_object_store_memory{"):
                total, found = total + float(line.rpartition(" ")[2]) / 1e6, True
    return total if found else None


def summary(points: Sequence[tuple[int, float]], steps: int) -> dict[str, Any]:
    """First and last value after the warm-up, the slope per 100 steps and its standard error, and the medians of equal
    stretches of it all."""
    medians = [float(np.median(part)) for part in np.array_split(np.array(points)[:, 1], STRETCHES) if len(part)]
    kept = [(step, value) for step, value in points if step >= WARM_UP * steps]
    ends = {"first": (kept or points)[0][1], "last": (kept or points)[-1][1]}
    if len({step for step, _ in kept}) < 3:
        return {**ends, "slope": 0.0, "error": 0.0, "medians": medians}
    at = sorted({step for step, _ in kept})
    values = [np.mean([value for step, value in kept if step == each]) for each in at]
    (slope, _), covariance = np.polyfit(at, values, 1, cov=True)
    return {**ends, "slope": 100 * float(slope), "error": 100 * float(covariance[0, 0]) ** 0.5, "medians": medians}


def draw(memory: Mapping[str, Sequence[tuple[int, float]]], steps: int, path: Path) -> None:
    """What each process has grown by since the warm-up's end, over steps; a name for those that moved by a megabyte."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    still = 0
    for who, points in sorted(memory.items(), key=lambda item: -item[1][-1][1]):
        if who == STORE or points[-1][0] - points[0][0] < steps / 2:
            continue
        at, megabytes = np.array(points).T
        level = np.median(megabytes[at >= WARM_UP * steps])
        stretches = np.array_split(np.array([at, megabytes - level]), 2 * STRETCHES, axis=1)
        medians = np.array([np.median(stretch, axis=1) for stretch in stretches]).T
        after = medians[1, round(WARM_UP * len(stretches)) :]
        if moved := bool(np.ptp(after) >= 1):
            (line,) = axes.plot(*medians, label=f"{who} ({level:.0f} MB)", linewidth=1.5)
            axes.plot(at, megabytes - level, color=line.get_color(), linewidth=0.4, alpha=0.3)
        else:
            axes.plot(*medians, color="0.7", linewidth=1)
        still += not moved
    axes.axvline(WARM_UP * steps, color="0.5", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="resident memory beside its median after the dotted line, MB", ylim=(-60, 60))
    axes.set_title(
        f"Memory over {steps:,} steps, medians of {2 * STRETCHES} stretches;\n"
        f"grey: {still} processes whose medians moved by less than 1 MB",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def table(figures: Mapping[str, Any]) -> str:
    """Markdown: a line for each process."""
    rows = ["| process | MB after warm-up | at the end | per 100 steps | open files | at the end |", "|---" * 6 + "|"]
    for who, memory in sorted(figures["megabytes"].items(), key=lambda item: -item[1]["last"]):
        files = figures["open_files"].get(who)
        opened = f"{files['first']:.0f} | {files['last']:.0f}" if files else "- | -"
        slope = f"{memory['slope']:+.2f} ± {memory['error']:.2f}"
        rows.append(f"| {who} | {memory['first']:.1f} | {memory['last']:.1f} | {slope} | {opened} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
