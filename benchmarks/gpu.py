"""What can only be measured on a GPU: `python -m benchmarks.gpu --stage smoke` (or train, speed, regimes, faults).

For a machine with one GPU and no network; models have random weights at real shapes. Each stage is cut into parts, each
in a process of its own with a deadline, so that one that fails costs no other. A stage prints its table last, and
appends it to results.jsonl in the folder of --out, beside a log of each part. With --device cpu --tiny the same code
runs at toy sizes on a CPU. docs/gpu.md says what each stage measures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil

from actors.waiting import Deadline
from benchmarks.gpu_stages.part import Part, Row, Setting, table
from benchmarks.harness import ROOT, hardware, record
from cluster.gpu import has_gpu
from configs.errors import FAILURE, USAGE
from learner.ending import end_process

SECONDS = {"smoke": 120.0, "train": 270.0, "speed": 530.0, "regimes": 300.0, "faults": 280.0}  # 25 minutes in all
GPU_RUNS = ROOT / "runs" / "gpu"
LAST_WORDS = 300  # characters of the log's last line, where a part failed
NO_GPU = "There is no NVIDIA GPU on this machine; --device cpu --tiny runs the same code at toy sizes on its CPU."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage: 0 if every part of it ran, whatever it measured, else 1; 2 where there is no GPU."""
    given = _parser().parse_args(argv)
    if given.device == "cuda" and not has_gpu():
        print(NO_GPU, file=sys.stderr)
        return USAGE
    given.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(given.device, given.tiny, given.models)
    parts = {part.name: part for part in parts_of(given.stage, setting)}
    if unknown := set(given.only or ()) - set(parts):
        print(f"--only: {', '.join(unknown)} is none of {given.stage}'s parts: {', '.join(parts)}.", file=sys.stderr)
        return USAGE
    chosen = [part for name, part in parts.items() if not given.only or name in given.only]
    if given.here:
        with given.here.open("w") as answer:
            for row in chosen[0].run(setting):
                print(json.dumps(asdict(row), allow_nan=False), file=answer, flush=True)
        return 0
    begun = time.monotonic()
    rows, whole = run_stage(given, chosen, setting)
    seconds = time.monotonic() - begun
    figures = {"device": given.device, "tiny": given.tiny, "seconds": seconds, "rows": [asdict(row) for row in rows]}
    record(f"gpu {given.stage}", figures, given.out / "results.jsonl")
    print(f"\n{given.stage} on {', '.join(hardware()['gpus']) or 'a CPU'}, {seconds:.0f} s\n{table(rows)}")
    return 0 if whole else FAILURE


def _path(text: str) -> Path:
    return Path(text).resolve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(SECONDS), required=True)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts of the stage, by the names of their logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=_path, default=GPU_RUNS, help="folder for logs and results (%(default)s)")
    parser.add_argument("--models", type=_path, default=GPU_RUNS / "models", help="for models made here (%(default)s)")
    parser.add_argument("--seconds", type=float, help="in the place of the stage's own bound")
    parser.add_argument("--here", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # a part's own process, its rows
    return parser


def parts_of(stage: str, setting: Setting) -> list[Part]:
    """The parts of a stage, in the order of their worth."""
    # Imported here, so that --help and a machine without a GPU answer at once.
    from benchmarks.gpu_stages import faults, regimes, smoke, speed, train

    stages = {"smoke": smoke, "train": train, "speed": speed, "regimes": regimes, "faults": faults}
    return stages[stage].parts(setting)


def run_stage(given: argparse.Namespace, parts: Sequence[Part], setting: Setting) -> tuple[list[Row], bool]:
    """The rows of every part, and whether all of them ran."""
    deadline = Deadline(given.seconds or SECONDS[given.stage])
    rows: list[Row] = []
    whole = True
    for part in parts:
        name, new = f"{given.stage} {part.name}", list[Row]()
        if not deadline.left:
            fault = "not run: the stage's time was over"
        else:
            new, fault = run_part(given, part, setting, min(part.seconds, deadline.left))
        whole = whole and not fault
        new += [Row(name, fault)] if fault else []
        for row in new:
            print(f"[{name}] {row.what}: {row.measured} {row.judgement}".rstrip(), flush=True)
        rows += new
    return rows, whole


def run_part(given: argparse.Namespace, part: Part, setting: Setting, seconds: float) -> tuple[list[Row], str]:
    """Its rows, as far as it came, and in a sentence why there are no more; empty if it ran whole."""
    log, answer = (given.out / f"{given.stage}-{part.name}.{kind}" for kind in ("log", "json"))
    answer.unlink(missing_ok=True)
    where = ["--device", given.device, "--models", str(setting.models), *(["--tiny"] if given.tiny else [])]
    what = ["--stage", given.stage, "--only", part.name, "--here", str(answer), "--out", str(given.out)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", *what, *where],
            cwd=ROOT,
            env=environment(given.device),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    rows = [Row(**json.loads(line)) for line in answer.read_text().splitlines()] if answer.exists() else []
    if code is None:
        return rows, f"failed: not done after {seconds:.0f} s; see {log}"
    if code:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return rows, f"failed: {lines[-1][-LAST_WORDS:] if lines else f'exit code {code}'}; see {log}"
    return rows, ""


def environment(device: str) -> dict[str, str]:
    """Of a part's process: no network, a Ray of its own, and on a CPU no GPU."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"HF_HUB_OFFLINE": "1"}
    return own if device == "cuda" else own | {"CUDA_VISIBLE_DEVICES": ""}


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it has started, if it has not ended."""
    if process.poll() is None:
        whole = psutil.Process(process.pid)
        for each in [*whole.children(recursive=True), whole]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


if __name__ == "__main__":
    end_process(main())
