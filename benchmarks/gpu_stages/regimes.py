"""What DASH saves, and how well sampling and learning overlap: ratios of whole runs, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.dash import variants
from benchmarks.gpu_stages.part import Part, Row, Setting
from benchmarks.gpu_stages.recipe import TEACH_SECONDS, settings, taught_model
from benchmarks.recipe_run import measure

RUN_SECONDS = 150.0
STALENESS = (0, 1)
CHOSEN = (0, 2, 3)  # of DASH's variants: a step per few completions, the whole batch in one go, and DASH
SIDE_BY_SIDE = ("-m", "benchmarks.gpu_stages.side_by_side")


def parts(setting: Setting) -> list[Part]:
    """DASH, then sampling ahead by each bound on staleness."""
    ahead = [Part(f"staleness-{s}", partial(overlap, staleness=s), TEACH_SECONDS + RUN_SECONDS) for s in STALENESS]
    return [Part("dash", dash, TEACH_SECONDS + len(CHOSEN) * RUN_SECONDS), *ahead]


def dash(setting: Setting) -> Iterator[Row]:
    """Seconds of all steps, as many completions in each run, and their ratio to those of the first."""
    prompts, completions, small, steps = setting.size((64, 8, 64, 4), (4, 4, 4, 1))
    several = list(variants(steps, prompts, completions, small).items())
    batch = (f"rollout.prompts_per_batch={prompts}", f"training.steps={steps}")
    first = None
    for name, options in (several[place] for place in CHOSEN):
        chosen = settings(setting, taught_model(setting), *batch, *options)
        found = measure(*chosen, deadline_seconds=RUN_SECONDS)
        first = first or found["step_seconds"]
        filtered = found["policy/filtered"] if found["updates"] else 1.0  # a mean over updates; without any, all were
        yield Row(name, found["step_seconds"], f"s, {100 * filtered:.0f} % filtered")
        yield Row(f"{name}: ratio", found["step_seconds"] / first)


def overlap(setting: Setting, staleness: int) -> list[Row]:
    """Median seconds of a step with both sides on one device, and their ratio to the slower side's.

    On one GPU the sides compete for it, so the ratio says what sampling ahead hides there, not on a GPU for each.
    """
    options = (
        "cluster.placement=disaggregated",
        f"cluster.max_staleness={staleness}",
        f"training.steps={setting.size(10, 3)}",
    )
    chosen = settings(setting, taught_model(setting), *options)
    found = measure(*chosen, deadline_seconds=RUN_SECONDS, program=SIDE_BY_SIDE)
    seconds = found["median_seconds"]
    slower = max(seconds["sample"] + seconds["verify"], seconds["update"] + seconds["sync"])
    name = f"max_staleness {staleness}"
    return [
        Row(f"{name}: step", seconds["step"], "s"),
        Row(f"{name}: ratio to the slower side", seconds["step"] / slower),
        Row(f"{name}: staleness", found["rollout/staleness"], "versions", most=staleness),
        Row(f"{name}: mean log-prob difference", found["rollout/logprob_diff"], "nats", most=0.005),
    ]
