"""DASH on the quickstart, against GRPO that steps after every micro-batch and GRPO with the same batch:
`python -m benchmarks.dash`.

All see as many completions at the same learning rate, in one session of the machine, one after another: times are
compared within a call. `--table` only prints what is recorded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import record
from benchmarks.recipe_run import measure, percent, recorded

NAME = "dash"
KL = "learner.kl_coefficient=0.04"
FILTER = "learner.filter_threshold=0.01"


def variants(steps: int = 18, prompts: int = 64, completions: int = 8, small: int = 16) -> dict[str, tuple[str, ...]]:
    """Settings of the runs that are compared: `steps` steps of so many prompts with so many completions each, and the
    baseline that steps after every `small` completions."""
    parts = prompts * completions // small
    often = (f"rollout.prompts_per_batch={small // completions}", f"training.steps={parts * steps}")
    return {
        f"GRPO, a step per {small} completions": (KL, *often),
        f"GRPO, same batch, sampled {small} at a time": (KL, f"rollout.max_running={small}"),
        "GRPO, same batch, sampled in one go": (KL,),
        "DASH": (KL, FILTER),
        "DASH without KL": (FILTER,),
    }


ABLATIONS: dict[str, tuple[str, ...]] = {
    "PPO Multi (the batch 3 times)": (KL, FILTER, "learner.epochs_per_batch=3"),
    "PPO Mini (32 updates of 16)": (KL, FILTER, "learner.completions_per_update=16"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the newest recorded call")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args(argv)
    if not given.table:
        found = {}
        for name, settings in {**variants(), **ABLATIONS}.items():
            found[name] = measure(*settings, "evaluation.every=0", f"training.seed={given.seed}")
            print(name, percent(found[name]["after"]), f"{found[name]['step_seconds']:.0f} s", flush=True)
        record(NAME, {"seed": given.seed, "variants": found})
    print(table(recorded(NAME)[-1]))
    return 0


def table(figures: dict[str, Any]) -> str:
    """Markdown: seconds by phase, the ratio to the first line's, and accuracy after the run."""
    variants = figures["variants"]
    first = next(iter(variants.values()))["step_seconds"]
    heads = ("sample s", "update s", "sync s", "all s", "ratio", "optimizer steps", "filtered", "after")
    rows = [f"| seed {figures['seed']} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, line in variants.items():
        seconds = [f"{line[f'{phase}_seconds']:.1f}" for phase in ("sample", "update", "sync", "step")]
        rows.append(
            f"| {name} | {' | '.join(seconds)} | {line['step_seconds'] / first:.2f} | {line['updates']:.0f} | "
            f"{100 * line.get('policy/filtered', 0.0):.0f} % | {percent(line['after'])} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
