"""What the DASH paper compares, on the quickstart: RL with SFT, no KL with KL, PPO-style updates with on-policy ones:
`python -m benchmarks.paper_comparisons`.

Three seeds each, a minute or two a run on two cores. Runs recorded in benchmarks/results.jsonl are not made again, so
the table grows over several calls; `--table` only prints it, `--again` begins anew.
"""

from __future__ import annotations

import sys

from benchmarks.recipe_run import grow_table, percent, recorded, run_cell

NAME = "paper comparisons"
VARIANTS: dict[str, tuple[str, ...]] = {  # a recipe, then settings
    "GRPO, on-policy, no KL": ("quickstart",),
    "with KL 0.04": ("quickstart", "learner.kl_coefficient=0.04"),
    "PPO Multi: the batch 3 times": ("quickstart", "learner.epochs_per_batch=3"),
    "PPO Mini: 32 updates of 16": ("quickstart", "learner.completions_per_update=16"),
    "SFT on the worked answers": ("quickstart_sft",),
}


def run_seed(seed: int, again: bool) -> None:
    """Measure the cells of a training seed."""
    for name, settings in VARIANTS.items():
        cell = {"variant": name, "seed": seed}
        run_cell(NAME, cell, [*settings, "evaluation.every=3", f"training.seed={seed}"], again)


def table() -> str:
    """Markdown: a line a variant; for every seed the accuracy on the way, in per cent, and at the end."""
    cells = {(line["variant"], line["seed"]): line for line in recorded(NAME)}
    seeds = sorted({seed for _, seed in cells})
    heads = [f"seed {seed}: after 3, 6, 9 steps; 18" for seed in seeds]
    rows = ["| variant | " + " | ".join(heads) + " |", "|---" * (1 + len(seeds)) + "|"]
    for name in VARIANTS:
        shown = []
        for seed in seeds:
            line = cells.get((name, seed))
            on_the_way = [f"{100 * line['evaluations'][step]:.1f}" for step in ("3", "6", "9")] if line else []
            shown.append(f"{', '.join(on_the_way)}; {percent(line['after'])}" if line else "")
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(grow_table(None, __doc__, run_seed, table))
