"""How fast, at several sizes: whole steps, the learner's FLOP/s, the weight sync, sampling beside vLLM alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.gpu_stages.memory import PeakMemory, beside_plan, plan_here
from benchmarks.gpu_stages.models import SHAPES, random_model
from benchmarks.gpu_stages.part import Part, Row, Setting
from benchmarks.gpu_stages.raw_vllm import raw_rates
from benchmarks.gpu_stages.recipe import settings
from benchmarks.gpu_stages.rig import Rig, random_prompts, rig
from benchmarks.harness import measure
from benchmarks.learner_speed import lone_rank
from benchmarks.recipe_run import figures, finished_run, metric_lines
from cluster.hardware import hardware_here
from cluster.memory import WEIGHT_BYTES, kv_bytes_per_token
from cluster.model_shape import Shape
from configs.loading import load_config
from configs.schema import Config
from data.records import Prompt
from learner.batching import Sequence as Completion

ORDER = (
    ("learner", "1.5B"),
    ("worker", "1.5B"),
    ("run", "0.5B"),
    ("learner", "3B"),
    ("learner", "0.5B"),
    ("worker", "0.5B"),
    ("sync", "3B"),
    ("sync", "0.1B"),
    ("run", "1.5B"),
)
WARN = "training.guards.logprob_diff=warn"  # random weights may round more than learned ones
PART_SECONDS = 200.0
REPEATS = 3
NO_PEAK = "says nothing on a CPU"


def parts(setting: Setting) -> list[Part]:
    """What has goals first."""
    kinds = {"learner": learner, "worker": worker, "run": whole_run, "sync": sync}
    order = [(kind, "tiny") for kind in kinds] if setting.tiny else ORDER
    return [Part(f"{kind}-{shape}", partial(kinds[kind], shape=shape), PART_SECONDS) for kind, shape in order]


# -- the learner ----------------------------------------------------------------------------------


def learner(setting: Setting, shape: str) -> list[Row]:
    """Tokens a second and MFU of whole updates on packed rows of at most 4k tokens, without recomputing activations."""
    longest, total = setting.size((4096, 65536), (128, 2048))
    completions = random_completions(longest, total, SHAPES[shape].vocabulary)
    tokens = sum(c.length for c in completions)
    rank = lone_rank(learner_config(setting, shape, longest), random_model(setting, shape))

    def update() -> None:
        rank.update(completions, on_policy=False)
        if setting.device == "cuda":
            torch.cuda.synchronize()  # the optimizer's kernels

    seconds = measure(update, REPEATS).median
    name = f"learner {shape}"
    rows = [Row(f"{name}: an update of {tokens:,} tokens", seconds, "s"), Row(name, tokens / seconds, "tokens/s")]
    if setting.device == "cpu":
        return [*rows, Row(f"{name}: MFU", NO_PEAK)]
    peak = hardware_here().device.flops("bfloat16")
    mfu = 100 * update_flops(SHAPES[shape], completions) / seconds / peak
    plan = plan_here(setting, rank.config).learner
    held = torch.cuda.max_memory_reserved()
    return [
        *rows,
        Row(f"{name}: MFU", mfu, "%", **setting.goal(least=40.0)),
        Row(f"{name}: planned / measured memory", (plan.peak - plan.held["process"]) / held),
    ]


def update_flops(shape: Shape, completions: Sequence[Completion]) -> float:
    """FLOPs that an update needs, recomputed ones left out: two for each multiplied parameter and token forward, twice
    as many backward; the head for completion tokens alone; attention's two products over a causal half."""
    tokens = sum(c.length for c in completions)
    targets = sum(len(c.completion_ids) for c in completions)
    body = shape.multiplied_parameters - shape.embedding_parameters
    attention = 2 * shape.layers * shape.query_width * sum(c.length**2 for c in completions)
    return 3.0 * (2 * body * tokens + 2 * shape.embedding_parameters * targets + attention)


def random_completions(longest: int, total: int, vocabulary: int) -> list[Completion]:
    """About `total` random tokens: sequences of a quarter of the longest to all of it, an eighth of it the prompt."""
    random = np.random.default_rng(0)
    found: list[Completion] = []
    while sum(c.length for c in found) < total:
        length = int(random.integers(longest // 8, longest - longest // 8 + 1))
        found.append(
            Completion(
                prompt_ids=random.integers(8, vocabulary, longest // 8).astype(np.int32),
                completion_ids=random.integers(8, vocabulary, length).astype(np.int32),
                sampler_logprobs=np.full(length, -10.0, dtype=np.float32),
                advantage=1.0 if len(found) % 2 else -1.0,
            )
        )
    return found


def learner_config(setting: Setting, shape: str, longest: int) -> Config:
    """Micro-batches as large as the plan lets them be. RuntimeError if even one row is too large."""
    model = random_model(setting, shape)
    for rows in (8, 4, 2, 1):
        options = (
            f"model.name={model}",
            "model.dtype=bfloat16",
            "model.gradient_checkpointing=false",
            f"data.max_prompt_tokens={longest // 8}",
            f"rollout.max_completion_tokens={longest - longest // 8}",
            "learner.optimizer=adamw_8bit",
            "learner.zero_stage=0",
            "learner.learning_rate=1e-9",
            f"learner.tokens_per_micro_batch={rows * longest}",
        )
        plan = plan_here(setting, load_config(None, options))
        if plan.learner.peak < plan.usable:
            return plan.config
    raise RuntimeError(f"a micro-batch of {longest} tokens does not fit at {shape}")


# -- the rollout worker ---------------------------------------------------------------------------


def sync(setting: Setting, shape: str) -> list[Row]:
    """The weight sync alone."""
    with rig(setting, random_model(setting, shape), "rollout.kv_cache_mb=256", "rollout.max_running=16") as both:
        return pushes(setting, both, shape)


def worker(setting: Setting, shape: str) -> list[Row]:
    """The weight sync; and tokens a second, as a run asks for them, beside vLLM alone."""
    running, prompt, length = setting.size((128, 128, 512), (8, 48, 16))
    model = random_model(setting, shape)
    options = (
        f"data.max_prompt_tokens={prompt}",
        f"rollout.max_completion_tokens={length}",
        f"rollout.max_running={running}",
        "rollout.completions_per_prompt=4",
        *setting.size(("rollout.kv_cache_mb=8192",), ()),
    )
    prompts = random_prompts(running // 4, prompt, SHAPES[shape].vocabulary)
    with rig(setting, model, *options) as both:
        config, rows = both.config, pushes(setting, both, shape)
        ours = statistics.median([_rate(both, prompts) for _ in range(1 + REPEATS)][1:])
    raw = statistics.median(raw_rates(config, model, prompts, setting.device, REPEATS))
    name = f"sampling {shape}"
    rows += [
        Row(name, ours, "tokens/s"),
        Row(f"{name}: vLLM alone", raw, "tokens/s"),
        Row(f"{name}: ratio to vLLM alone", ours / raw, **setting.goal(least=0.95)),
    ]
    if setting.device == "cpu":
        return [*rows, Row(f"{name}: memory bandwidth", NO_PEAK)]
    read = bytes_read(config, SHAPES[shape], running, prompt, length) / (running * length / ours)
    peak = hardware_here().device.bandwidth
    return [*rows, Row(f"{name}: memory bandwidth", 100 * read / peak, "%")]


def pushes(setting: Setting, both: Rig, shape: str) -> list[Row]:
    """Seconds of a weight sync with both sides awake, its parts, and bytes a second."""
    found: list[dict[str, float]] = []
    seconds = measure(lambda: found.append(both.push()), setting.size(7, 2)).median
    size = WEIGHT_BYTES[both.config.model.dtype] * SHAPES[shape].parameters
    goal = setting.goal(most=0.1) if shape == "1.5B" else setting.goal()
    rows = [
        Row(f"sync {shape}, {size / 1e9:.2g} GB", seconds, "s", **goal),
        Row(f"sync {shape}: rate", size / seconds / 1e9, "GB/s"),
    ]
    for part in found[-1]:
        name = f"sync {shape}: {part.removeprefix('time/sync_')}"
        rows.append(Row(name, statistics.median(each[part] for each in found[1:]), "s"))
    return rows


def _rate(both: Rig, prompts: Sequence[Prompt]) -> float:
    """Tokens a second."""
    begun = time.perf_counter()
    groups = both.sample(prompts)
    return sum(len(c.token_ids) for group in groups for c in group.completions) / (time.perf_counter() - begun)


def bytes_read(config: Config, shape: Shape, running: int, prompt: int, length: int) -> float:
    """What decoding so many completions at once must read: all weights each step, and each one's keys and values."""
    weights = WEIGHT_BYTES[config.model.dtype] * shape.multiplied_parameters
    context = length * prompt + length * (length - 1) / 2
    return length * weights + running * context * kv_bytes_per_token(config, shape)


# -- a whole step ---------------------------------------------------------------------------------


def whole_run(setting: Setting, shape: str) -> list[Row]:
    """Seconds by phase and peak memory of the recipe with completions as long as it allows."""
    options = settings(setting, random_model(setting, shape), f"training.steps={setting.size(3, 2)}")
    options = (*options, WARN, *setting.size(("data.held_out_problems=16",), ()))
    with PeakMemory(setting.device) as peak, finished_run(*options, deadline_seconds=PART_SECONDS - 10) as run:
        seconds = figures(run)["median_seconds"]
        rates = [line["tokens/per_second"] for line in metric_lines(run) if "time/step" in line]
    rows = [Row(f"run {shape}: {phase}", value, "s") for phase, value in seconds.items()]
    rows.append(Row(f"run {shape}: sampled, over whole steps", statistics.median(rates), "tokens/s"))
    return [*rows, *beside_plan(setting, load_config(options[0], options[1:]), peak, f"run {shape}")]
