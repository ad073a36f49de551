"""What a run gets over on a GPU: a rollout worker killed, the whole run killed and resumed, many turns of sleep."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.waiting import Deadline
from benchmarks.gpu_stages.memory import used_gpu_memory
from benchmarks.gpu_stages.models import SHAPES, base_shape, random_model
from benchmarks.gpu_stages.part import Part, Row, Setting
from benchmarks.gpu_stages.recipe import TEACH_SECONDS, settings, taught_model
from benchmarks.gpu_stages.rig import random_prompts, rig
from benchmarks.harness import ROOT
from benchmarks.prey import LEARNER, WORKER, actors, await_, steps_done, strike
from benchmarks.recipe_run import metric_lines
from cluster.hardware import MIB
from cluster.turns import Turns

RUN_SECONDS = 200.0
STEPS, TINY_STEPS, SAVE_EVERY = 10, 8, 2
CYCLES, TINY_CYCLES = 200, 20
CYCLES_SECONDS = 120.0  # after which those not made are left out, and said so
SETTLED = 5  # cycles after which memory should not grow
LEAK_MIB = 64.0
SIDES = {"the rollout worker": WORKER, "the learner rank": LEARNER}
RELEASE_SECONDS = 20.0  # for the driver to take back what a killed process had


def parts(setting: Setting) -> list[Part]:
    """Kills, then turns."""
    return [Part("kills", kills, TEACH_SECONDS + 2 * RUN_SECONDS), Part("sleep", sleep, RUN_SECONDS)]


# -- whole runs -----------------------------------------------------------------------------------


def kills(setting: Setting) -> Iterator[Row]:
    """SIGKILL to the rollout worker of a run, which goes on with another; then to the run itself, which is resumed."""
    steps = setting.size(STEPS, TINY_STEPS)
    idle = used_gpu_memory() if setting.device == "cuda" else 0.0
    with begun(setting, steps) as (run, folder):
        yield from worker_killed(run, folder)
        await_(lambda: steps_done(folder) >= steps - 2, f"step {steps - 2}", run)
        run.kill()
        run.wait(60)
        if setting.device == "cuda":
            yield memory_left(idle)
        again = start("--resume", str(folder))
        try:
            said = end(again)
        finally:
            again.kill()
        status, seen = status_of(folder), updates(folder)
    lost = status["prompts"]["handed_out"] - status["prompts"]["trained"]
    resumed = re.search(r"starting vLLM and DeepSpeed with .*(step_\d+)", said)
    yield from (
        Row("driver killed: went on at", resumed[1] if resumed else "the start"),
        Row("both killed: the run is", str(status["state"])),
        Row("both killed: steps", len(seen), least=steps, most=steps),
        Row("both killed: prompts lost", lost, most=0),
        Row(
            "both killed: largest mean log-prob difference of a step",
            max(s["rollout/logprob_diff"] for s in seen),
            "nats",
            most=0.005,
        ),
    )


def worker_killed(run: subprocess.Popen[str], folder: Path) -> list[Row]:
    """In the middle of the step after the second."""
    strike(run, folder, WORKER, signal.SIGKILL, after_step=2)
    before, struck = steps_done(folder), time.monotonic()
    await_(lambda: steps_done(folder) > before, "a step after the kill", run)
    seconds = time.monotonic() - struck
    await_(lambda: status_of(folder)["step"] > before, "its status", run)
    return [
        Row("worker killed: restarts", status_of(folder)["restarts"], least=1, most=1),
        Row("worker killed: seconds to the next step", seconds, "s"),
    ]


def status_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def updates(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run's steps."""
    return [line for line in metric_lines(folder) if "rollout/logprob_diff" in line]


@contextmanager
def begun(setting: Setting, steps: int) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run of the recipe by run_local, and its folder; ended with the block."""
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-faults-") as folder:
        place = (f"training.runs_dir={folder}", "training.name=run", "telemetry.live=off")
        model = taught_model(setting)
        options = settings(setting, model, f"training.steps={steps}", f"checkpoint.every={SAVE_EVERY}", *place)
        run = start("--config", *options)
        try:
            yield run, Path(folder) / "run"
        finally:
            run.kill()
            run.wait(60)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(ROOT / "run_local.py"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(run: subprocess.Popen[str]) -> str:
    """What it said; RuntimeError unless it ends well."""
    said, _ = run.communicate(timeout=RUN_SECONDS)
    if run.returncode:
        raise RuntimeError(f"the run ended with {run.returncode}:\n{said[-4000:]}")
    return said


def memory_left(idle: float) -> Row:
    """What is not given back of the GPU's memory after the processes that had it were killed."""
    deadline = Deadline(RELEASE_SECONDS)
    while (left := used_gpu_memory() - idle) > LEAK_MIB * MIB and deadline.left:
        time.sleep(0.5)
    return Row("driver killed: GPU memory left behind", left / MIB, "MiB", most=LEAK_MIB)


# -- turns ----------------------------------------------------------------------------------------


def sleep(setting: Setting) -> list[Row]:
    """Turns of sleeping and waking, as colocated steps take them; what memory has grown by, and whether all is still
    right after."""
    cycles, shape = setting.size(CYCLES, TINY_CYCLES), base_shape(setting)
    prompts = random_prompts(4, 48, SHAPES[shape].vocabulary)
    with rig(setting, random_model(setting, shape), "learner.learning_rate=1e-9") as both:
        both.turns = Turns(both.actors.rollouts, both.actors.learner, shared=True)
        both.learn(both.sample(prompts))  # the optimizer has states from now on
        both.push()
        asleep, before = 0.0, memory(setting)
        begun, deadline, cycle = time.monotonic(), Deadline(CYCLES_SECONDS), 0
        while cycle < cycles and deadline.left:
            cycle += 1
            both.turns.learning()
            asleep = used_gpu_memory() if setting.device == "cuda" else 0.0
            both.turns.sampling()
            if cycle == SETTLED:
                before = memory(setting)
        seconds, after = (time.monotonic() - begun) / cycle, memory(setting)
        difference = both.difference(both.sample(prompts))[0]
    grown = {who: (after[who] - before[who]) / MIB for who in before}
    on_gpu = setting.device == "cuda"
    freed = (after["the GPU"] - asleep) / MIB if on_gpu else "nothing sleeps on a CPU but the optimizer"
    return [
        Row("turns", cycle, least=cycles),
        Row("a turn, mean", seconds, "s"),
        *(Row(f"grown over {cycle} turns: {who}", size, "MiB", most=LEAK_MIB) for who, size in grown.items()),
        Row("GPU memory, sampling less learning", freed, "MiB"),
        Row("mean log-prob difference after", difference, "nats", most=0.005),
    ]


def memory(setting: Setting) -> dict[str, float]:
    """Resident bytes of both sides' processes, and those in use on the GPU."""
    held: dict[str, float] = {}
    for who, kind in SIDES.items():
        held[who] = sum(process.memory_info().rss for process in actors(os.getpid(), kind))
    if setting.device == "cuda":
        held["the GPU"] = used_gpu_memory()
    return held
