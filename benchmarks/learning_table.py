"""The quickstart with every objective, on-policy and with 8 updates a sampling batch, on three seeds:
`python -m benchmarks.learning_table`.

Each run takes a minute or two on two cores. Runs recorded in benchmarks/results.jsonl are not made again, so the
table grows over several calls; `--table` only prints it, `--again` begins anew.
"""

from __future__ import annotations

import sys
from itertools import product

from benchmarks.recipe_run import grow_table, percent, recorded, run_cell

NAME = "learning table"
OBJECTIVES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
REGIMES: dict[str, tuple[str, ...]] = {
    "on-policy": (),
    "8 updates": ("learner.completions_per_update=64",),
}
# With 8 updates the bounds are closer to 1 than usual: the small steps of the quickstart's learning rate would seldom
# reach 0.2, and clipping must have work to do. gspo's own are close enough.
TIGHT = ("learner.clip_low=0.03", "learner.clip_high=0.03")
OWN: dict[tuple[str, str], tuple[str, ...]] = {
    ("grpo", "8 updates"): TIGHT,
    ("dr_grpo", "8 updates"): TIGHT,
    ("dapo", "8 updates"): ("learner.clip_low=0.03", "learner.clip_high=0.042"),
    ("cispo", "8 updates"): ("learner.ratio_cap=1.001",),
}


def settings(objective: str, regime: str, seed: int) -> list[str]:
    own = OWN.get((objective, regime), ())
    return [f"learner.objective={objective}", *REGIMES[regime], *own, f"training.seed={seed}"]


def run_seed(seed: int, again: bool) -> None:
    """Measure the cells of a training seed."""
    for regime, objective in product(REGIMES, OBJECTIVES):
        cell = {"objective": objective, "regime": regime, "seed": seed}
        run_cell(NAME, cell, settings(objective, regime, seed), again)


def table() -> str:
    """Markdown: a line for every objective and regime, a column for every seed."""
    latest = {tuple(line["settings"]): line for line in recorded(NAME)}
    cells = {(line["objective"], line["regime"], line["seed"]): line for line in latest.values()}
    seeds = sorted({seed for _, _, seed in cells})
    rows = [
        "| objective | regime | " + " | ".join(f"seed {seed}" for seed in seeds) + " | clip fraction |",
        "|---" * (3 + len(seeds)) + "|",
    ]
    for objective, regime in product(OBJECTIVES, REGIMES):
        lines = [cells.get((objective, regime, seed)) for seed in seeds]
        there = [line for line in lines if line is not None]
        if not there:
            continue
        accuracies = " | ".join(percent(line["after"]) if line else "" for line in lines)
        clipped = ", ".join(f"{100 * line['policy/clip_fraction']:.1f} %" for line in there)
        rows.append(f"| {objective} | {regime} | {accuracies} | {clipped} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(grow_table(None, __doc__, run_seed, table))
