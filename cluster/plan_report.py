"""The plan in words and tables: `pocketgrpo plan --config X --hardware 4xA40`, and `--plan` of a training command."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from cluster.hardware import GIB, GPUS, Hardware, hardware_here, parse_hardware
from cluster.memory import OPTIMIZER_BYTES, activations, micro_batch_tokens, trained_parameters
from cluster.model_shape import model_shape
from cluster.phase_times import COMPLETION_SHARE, sequences_held
from cluster.plan import Plan
from cluster.terminal import Parser, say, say_error
from configs.errors import FAILURE, USAGE, UsageError
from configs.loading import find_config, load_config
from configs.mistakes import shown
from configs.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 0 if it fits, 1 if not, 2 on misuse."""
    parser = Parser(
        prog="pocketgrpo plan", description="What a run takes: memory, time, money. Nothing is loaded or started."
    )
    parser.add_argument("--config", default="quickstart", help="a YAML file, or a recipe by name")
    parser.add_argument(
        "--hardware",
        help=f"such as 4xA40; of {', '.join(gpu.name for gpu in GPUS.values())}, or cpu; default: what is here",
    )
    parser.add_argument("--price", type=float, help="dollars of a GPU-hour, in the place of the assumed ones")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options over the config")
    try:
        given = parser.parse_intermixed_args(argv)
        if given.price is not None and not 0 <= given.price < math.inf:
            raise UsageError(f"--price {given.price} is no price; give the dollars of a GPU-hour, such as 0.4.")
        config = load_config(given.config, given.overrides)
        hardware = parse_hardware(given.hardware) if given.hardware else hardware_here()
        return print_plan(config, find_config(given.config).stem, hardware, given.price)
    except UsageError as error:
        say_error(error)
        return USAGE


def print_plan(config: Config, name: str, hardware: Hardware, price: float | None) -> int:
    """Print the plan of a config; 0 if it fits, 1 if not. UsageError if the model's shape cannot be found."""
    plan = Plan(config, model_shape(config.model), hardware)
    say(report(plan, name, price))
    return 0 if plan.fits else FAILURE


def report(plan: Plan, name: str, price: float | None = None) -> str:
    """The whole plan as text."""
    blocks = [_head(plan, name), _memory(plan), _choices(plan), _times(plan, price)]
    if not plan.hardware.device.is_cpu:
        blocks.append(_splits(plan))
    blocks.append(_verdict(plan))
    return "\n\n".join("\n".join(block) for block in blocks)


def _head(plan: Plan, name: str) -> list[str]:
    config, device = plan.config, plan.hardware.device
    model, learner, cluster = config.model, config.learner, config.cluster
    trained = f"LoRA of rank {model.lora_rank}" if model.lora_rank else "all weights"
    each = " each" if plan.hardware.count > 1 else ""
    where = "the CPU" if device.is_cpu else _gpus(config.rollout.tensor_parallel)
    lines = [
        f"Plan of {name} on {plan.hardware.name}, {device.memory / GIB:.1f} GiB{each}",
        f"model       {model.name}: {plan.shape.parameters / 1e6:,.1f}M parameters in {model.dtype}, {trained}",
        f"learner     {cluster.learner_ranks} x ZeRO-{learner.zero_stage}, {learner.optimizer}, "
        f"gradient checkpointing {'on' if model.gradient_checkpointing else 'off'}, "
        f"micro-batches of {micro_batch_tokens(config):,.0f} tokens",
        f"sampler     {cluster.rollout_workers} x vLLM on {where}, "
        f"up to {config.rollout.max_running} completions at a time",
    ]
    if device.is_cpu:
        return [
            *lines,
            "placement   colocated: both sides take turns on the CPU, and all that they hold stays in memory",
        ]
    if cluster.resolved_placement == "colocated":
        how = "colocated: both sides share each GPU; the one not working sleeps (vLLM gives up weights and cache, the "
        return [*lines, f"placement   {how}learner", "            moves its states to the CPU's memory)"]
    first = cluster.rollout_workers * config.rollout.tensor_parallel
    sampling, learning = _gpus(first), _gpus(cluster.learner_ranks)
    return [*lines, f"placement   disaggregated: {sampling} to sample, {learning} to learn"]


def _gpus(count: int) -> str:
    return f"{count} GPU" + ("" if count == 1 else "s")


def _memory(plan: Plan) -> list[str]:
    """A column for every phase of every seat."""
    if plan.hardware.device.is_cpu:
        columns = [("rollout worker", n, plan.rollout.held | p) for n, p in plan.rollout.phases.items()]
        columns += [("learner rank", n, plan.learner.held | p) for n, p in plan.learner.phases.items()]
    else:
        columns = [(seat.name, phase, parts) for seat in plan.seats for phase, parts in seat.phases.items()]
    names = list(dict.fromkeys(name for _, _, parts in columns for name, size in parts.items() if size))
    wide = max(len(seat) for seat, _, _ in columns) + 2
    lines = [
        f"{'GiB':22}" + "".join(f"{seat:>{wide}}" for seat, _, _ in columns),
        f"{'':22}" + "".join(f"{phase:>{wide}}" for _, phase, _ in columns),
    ]
    for name in names:
        cells = [f"{parts[name] / GIB:.2f}" if parts.get(name) else "" for _, _, parts in columns]
        lines.append(f"{name:22}" + "".join(f"{cell:>{wide}}" for cell in cells))
    lines.append(f"{'sum':22}" + "".join(f"{sum(parts.values()) / GIB:>{wide}.2f}" for _, _, parts in columns))
    if plan.hardware.device.is_cpu:
        whole = plan.seats[0].phases["all"]
        lines.append("the machine: " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in whole.items() if size))
    elif plan.host:
        lines.append("CPU memory beside it: " + ", ".join(f"{n} {size / GIB:.1f}" for n, size in plan.host.items()))
    lines = [line.rstrip() for line in lines]
    lines.append(
        "peak: " + "; ".join(f"{s.name} {s.peak / GIB:.1f} of {plan.usable / GIB:.1f} GiB usable" for s in plan.seats)
    )
    return lines


def _choices(plan: Plan) -> list[str]:
    """What the main options trade: activations, optimizer, KV cache."""
    config, is_cpu = plan.config, plan.hardware.device.is_cpu
    sizes = {}
    for on in (True, False):
        other = config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": on})})
        sizes[on] = activations(other, plan.shape, plan.hardware.device) / GIB
    shard = trained_parameters(config, plan.shape) / (config.cluster.learner_ranks if config.learner.zero_stage else 1)
    states = ", ".join(
        f"{name} {size * shard / GIB:.2f}" + (" in the CPU's memory" if name == "adamw_cpu" and not is_cpu else "")
        for name, size in OPTIMIZER_BYTES.items()
    )
    return [
        f"activations {sizes[True]:.2f} GiB with gradient checkpointing, {sizes[False]:.2f} without",
        f"optimizer   {states}",
        *_cache(plan),
    ]


def _cache(plan: Plan) -> list[str]:
    config = plan.config
    held, given, possible = sequences_held(config, plan.shape), config.rollout.kv_cache_mb, plan.kv_cache_mb_possible
    line = (
        f"KV cache    rollout.kv_cache_mb={given} holds {held:,} sequences of {config.max_tokens:,} tokens, "
        f"and {config.rollout.max_running} run at a time"
    )
    useful = held < min(config.rollout.max_running, config.completions_per_batch)
    if useful and possible > given:
        return [line, f"            memory is left: it could be {possible}"]
    return [line, f"            memory would allow {possible}"] if possible > given else [line]


def _times(plan: Plan, price: float | None) -> list[str]:
    times, device, config = plan.times, plan.hardware.device, plan.config
    dollars = device.price if price is None else price
    unit = "machine-hour" if device.is_cpu else "GPU-hour"
    return [
        f"seconds     sample {_seconds(times.sample)}, update {_seconds(times.update)}, sync {_seconds(times.sync)}, "
        f"step {_seconds(times.step)} (completions of {COMPLETION_SHARE * config.rollout.max_completion_tokens:,.0f} "
        "tokens on average)",
        f"cost        1,000 steps: {times.step / 3.6:,.1f} hours, ${plan.cost(dollars):,.2f} at ${dollars:.2f} a {unit}"
        + (" (assumed; --price sets it)" if price is None else ""),
    ]


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _splits(plan: Plan) -> list[str]:
    splits = plan.splits()
    lines = [f"splits      of {plan.hardware.name}, seconds a step, with the other options as they are"]
    lines += [f"  {_seconds(s.times.step):>6}  {s}{'' if s.fits else '  (does not fit)'}" for s in splits]
    stale = plan.config.cluster.resolved_max_staleness
    alike = [s for s in splits if s.fits and bool(s.changes["cluster.max_staleness"]) == bool(stale)]
    if not alike:
        return [*lines, "recommended: none of them fits with the other options as they are"]
    return [*lines, f"recommended {as_options(alike[0].changes)}"]


def as_options(changes: dict[str, Any]) -> str:
    """As they are given on the command line."""
    words = {key: value if isinstance(value, str) else shown(value) for key, value in changes.items()}
    return " ".join(f"{key}={word}" for key, word in words.items())


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return ["It fits."]
    lines = [f"It does not fit: {'; '.join(plan.problems)}."]
    changes = plan.advice()
    if changes is None:
        return [
            *lines,
            "No change of one option or of several was found that makes it fit; take a smaller model or more memory.",
        ]
    return [*lines, f"Fix: {as_options(changes)}"]


if __name__ == "__main__":
    sys.exit(main())
