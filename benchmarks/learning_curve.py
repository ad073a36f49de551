"""Draws the learning curve of runs: `python -m benchmarks.learning_curve OUT.png LABEL=runs/NAME …`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


def read(folder: Path, key: str) -> tuple[list[int], list[dict[str, float]]]:
    """(steps, lines) of the metrics lines that carry `key`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if key in line]
    return [line["step"] for line in kept], kept


def draw(out: Path, runs: dict[str, Path]) -> None:
    """Training accuracy as a line, held-out accuracy as points with their intervals."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for label, folder in runs.items():
        steps, lines = read(folder, "verdict/correct")
        (line,) = axes.plot(steps, [line["verdict/correct"] for line in lines], alpha=0.45, linewidth=1.2)
        steps, lines = read(folder, "eval/accuracy")
        value = [line["eval/accuracy"] for line in lines]
        low = [line["eval/accuracy"] - line["eval/accuracy_low"] for line in lines]
        high = [line["eval/accuracy_high"] - line["eval/accuracy"] for line in lines]
        style: dict[str, Any] = {"fmt": "o-", "markersize": 4, "capsize": 3, "color": line.get_color()}
        axes.errorbar(steps, value, yerr=[low, high], label=f"held out, {label}", **style)
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot([], [], color="grey", alpha=0.45, label="of sampled completions, in training")
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def main(arguments: list[str]) -> int:
    """Parse `OUT.png LABEL=FOLDER …` and draw; 2 on misuse."""
    if len(arguments) < 2 or not all("=" in pair for pair in arguments[1:]):
        print("usage: python -m benchmarks.learning_curve OUT.png LABEL=runs/NAME ...", file=sys.stderr)
        return 2
    draw(Path(arguments[0]), {label: Path(path) for label, path in (pair.split("=", 1) for pair in arguments[1:])})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
