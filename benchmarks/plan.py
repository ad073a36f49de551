"""Planned beside measured memory: the peak of the learner rank and of the rollout worker in whole runs of three sizes.

    python -m benchmarks.plan [--only 1M|34M|135M] [--path FILE]

Each size is a run of two steps by `run_local.py`, with evaluations and checkpoints; what is read is the kernel's own
peak (VmHWM) of the two processes. Prints a Markdown table and appends its figures to benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import RESULTS, ROOT, record
from cluster.hardware import MIB, this_cpu
from cluster.model_shape import model_shape
from cluster.plan import Plan
from configs.loading import load_config
from configs.schema import WarmStart

HOUR = 3600.0
POLL_SECONDS = 0.2
ACTORS = {"learner": "ray::LearnerRank", "rollout": "ray::RolloutWorker"}
SHORT = ("training.steps=2", "checkpoint.every=1", "data.held_out_problems=16", "data.train_problems=40")
SIZES = {
    "1M": ("quickstart", *SHORT, "model.warm_start.steps=1"),
    "34M": (
        "quickstart",
        *SHORT,
        "rollout.prompts_per_batch=8",
        "rollout.max_completion_tokens=64",
        "learner.optimizer=adamw",
        "learner.tokens_per_micro_batch=2048",
    ),
    "135M": (
        "smollm2_cpu",
        *SHORT,
        "rollout.prompts_per_batch=4",
        "evaluation.samples=1",
        "learner.filter_threshold=null",
    ),
}


def settings_of(size: str, folder: Path) -> list[str]:
    """The run's recipe and options; a model of that size is written to the folder if none is at hand."""
    settings = list(SIZES[size])
    if size == "34M":
        write_random_model(folder / "model", WarmStart(hidden_size=512, layers=10))
        settings.append(f"model.name={folder / 'model'}")
    return settings


def write_random_model(folder: Path, options: WarmStart) -> None:
    """An untrained Llama with the small tokenizer."""
    from data.tokenizer import build_tokenizer
    from learner.warm_start import build_llama

    tokenizer = build_tokenizer()
    build_llama(options, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(settings: Sequence[str], folder: Path, deadline_seconds: float = HOUR) -> dict[str, dict[str, float]]:
    """Bytes planned and measured of both processes in a run with these settings. RuntimeError if the run fails."""
    config = load_config(settings[0], settings[1:])
    plan = Plan(config, model_shape(config.model), this_cpu())
    place = [f"training.runs_dir={folder}", "training.name=run", "telemetry.live=off"]
    command = [sys.executable, str(ROOT / "run_local.py"), "--config", *settings, *place]
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (
        (folder / "output").open("w+") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=alone) as run,
    ):
        try:
            peaks = watch(run, deadline_seconds)
        finally:
            run.terminate()
        if run.wait() or set(peaks) != set(ACTORS):
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{output.read()[-4000:]}")
    planned = {"learner": plan.learner.peak, "rollout": plan.rollout.peak}
    return {
        who: {"planned": planned[who], "measured": peaks[who], "ratio": planned[who] / peaks[who]} for who in ACTORS
    }


def watch(run: subprocess.Popen[Any], deadline_seconds: float) -> dict[str, float]:
    """The highest VmHWM, in bytes, seen of each kind of actor below the run until it ends."""
    peaks: dict[str, float] = {}
    deadline = time.monotonic() + deadline_seconds
    while run.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run has not ended after {deadline_seconds:.0f} s")
        note_peaks(run.pid, peaks)
        time.sleep(POLL_SECONDS)
    return peaks


def note_peaks(pid: int, peaks: dict[str, float]) -> None:
    """Raise `peaks` to the VmHWM, in bytes, of each kind of actor below a process."""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title = process.cmdline()[:1]
            who = next((who for who, actor in ACTORS.items() if title and title[0].startswith(actor)), None)
            if who is not None:
                peaks[who] = max(peaks.get(who, 0.0), peak_bytes(process.pid))
        except (psutil.Error, OSError):
            continue  # ended meanwhile


def peak_bytes(pid: int) -> float:
    """The kernel's high-water mark of a process's resident memory; 0 once it has let its memory go."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Planned beside measured peaks of memory.")
    parser.add_argument("--only", choices=tuple(SIZES))
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    options = parser.parse_args(argv)
    figures: dict[str, Any] = {}
    for size in [options.only] if options.only else SIZES:
        with tempfile.TemporaryDirectory(prefix="pocketgrpo-plan-") as folder:
            figures[size] = measure(settings_of(size, Path(folder)), Path(folder))
        print(size, json.dumps(figures[size]), file=sys.stderr, flush=True)
    lines = ["| parameters | process | planned MiB | measured MiB | planned / measured |", "|---|---|---|---|---|"]
    for size, found in figures.items():
        for who, of in found.items():
            cells = (size, who, f"{of['planned'] / MIB:.0f}", f"{of['measured'] / MIB:.0f}", f"{of['ratio']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    print(json.dumps(record("plan", figures, options.path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
