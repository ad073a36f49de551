"""How well sampling and learning overlap on the quickstart, and what it learns sampling ahead:
`python -m benchmarks.overlap`.

One core for each side: at staleness 0 they wait for each other, at 1 and 4 both work at once. Seconds are medians
over the steps, both sides timed while the other runs; the ratio is a step's seconds to the slower side's, 1 for a
perfect overlap. `--table` only prints what is recorded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import record
from benchmarks.recipe_run import measure, percent, recorded

NAME = "overlap"
STALENESS = (0, 1, 4)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the newest recorded call")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args(argv)
    if not given.table:
        found = {}
        for staleness in STALENESS:
            sides = ("cluster.placement=disaggregated", f"cluster.max_staleness={staleness}")
            found[str(staleness)] = measure(*sides, "evaluation.every=0", f"training.seed={given.seed}")
            print(line(str(staleness), found[str(staleness)]), flush=True)
        record(NAME, {"seed": given.seed, "staleness": found})
    print(table(recorded(NAME)[-1]))
    return 0


def table(figures: dict[str, Any]) -> str:
    """Markdown: a line for each bound on staleness."""
    heads = (
        f"max_staleness, seed {figures['seed']}",
        "sampling s",
        "learning s",
        "step s",
        "ratio",
        "staleness",
        "after",
    )
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*rows, *(line(*each) for each in figures["staleness"].items())])


def line(staleness: str, found: dict[str, Any]) -> str:
    seconds = found["median_seconds"]
    sampling, learning = seconds["sample"] + seconds["verify"], seconds["update"] + seconds["sync"]
    ratio = seconds["step"] / max(sampling, learning)
    shown = [f"{value:.2f}" for value in (sampling, learning, seconds["step"], ratio)]
    behind = f"{found['rollout/staleness']:.2f} on average, {found['rollout/stale_dropped']:g} groups dropped"
    return f"| {staleness} | {' | '.join(shown)} | {behind} | {percent(found['after'])} |"


if __name__ == "__main__":
    sys.exit(main())
