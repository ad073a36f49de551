"""Expected seconds of each phase of a step, from a small roofline model.

A phase takes as long as its arithmetic or its memory traffic at a share of the datasheet's rate, whichever is longer.
The shares are assumptions, of eager vLLM and of transformers; on a machine at hand a run's metrics are better.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.hardware import MIB, Device
from cluster.memory import (
    OPTIMIZER_BYTES,
    WEIGHT_BYTES,
    kv_bytes_per_token,
    sequence_kv_bytes,
    trained_parameters,
)
from cluster.model_shape import Shape
from configs.schema import Config

COMPLETION_SHARE = 0.5  # of the longest completion that the mean one takes
PROMPT_SHARE = 0.5  # the same of prompts
DECODE_SHARE = 0.6  # of the memory's bandwidth while decoding
PREFILL_SHARE = 0.5  # of the peak FLOP/s
LEARN_SHARE = 0.35
LINK_SHARE = 0.5
KERNEL_SECONDS = 6e-6  # to launch one, of which an eager layer has about
KERNELS_PER_LAYER = 15
STEP_SECONDS = 3e-3  # of vLLM's scheduler and sampler per decode step


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of a step's phases, and of the step as the placement and the staleness let them overlap."""

    sample: float
    update: float
    sync: float
    step: float


def phase_times(config: Config, shape: Shape, device: Device) -> PhaseTimes:
    learning, sync = update_seconds(config, shape, device), sync_seconds(config, shape, device)
    sampling = 0.0 if config.learner.supervised else sample_seconds(config, shape, device)
    overlapping = config.cluster.resolved_max_staleness > 0 and not device.is_cpu
    busy = max(sampling, learning) if overlapping else sampling + learning
    return PhaseTimes(sampling, learning, sync, busy + sync)


def sample_seconds(config: Config, shape: Shape, device: Device) -> float:
    """Prefill of every prompt once, then decoding, of as many completions at a time as may run and fit the cache."""
    rollout, gpus = config.rollout, config.rollout.tensor_parallel
    prompt, completion = PROMPT_SHARE * config.data.max_prompt_tokens, mean_completion(config)
    workers = config.cluster.rollout_workers
    completions = config.completions_per_batch / workers
    prefill = 2 * shape.multiplied_parameters * prompt * rollout.prompts_per_batch / workers
    prefill /= PREFILL_SHARE * device.flops(config.model.dtype) * gpus
    running = min(completions, rollout.max_running, sequences_held(config, shape) / COMPLETION_SHARE)
    running = max(1.0, running)
    context = prompt + completion / 2
    full, alone = (_decode_step(config, shape, device, n, context) for n in (running, 1.0))
    waves = max(1.0, completions / running)
    # Mean completions one after another, then the longest of the last wave to its end, almost alone.
    return prefill + waves * completion * full + (rollout.max_completion_tokens - completion) * alone


def _decode_step(config: Config, shape: Shape, device: Device, running: float, context: float) -> float:
    gpus, width = config.rollout.tensor_parallel, WEIGHT_BYTES[config.model.dtype]
    traffic = width * shape.multiplied_parameters / gpus + running * context * kv_bytes_per_token(config, shape)
    work = running * 2 * shape.multiplied_parameters / gpus
    launches = 0.0 if device.is_cpu else shape.layers * KERNELS_PER_LAYER * KERNEL_SECONDS
    rate = PREFILL_SHARE * device.flops(config.model.dtype)
    return STEP_SECONDS + max(traffic / (DECODE_SHARE * device.bandwidth), work / rate, launches)


def mean_completion(config: Config) -> float:
    return COMPLETION_SHARE * config.rollout.max_completion_tokens


def sequences_held(config: Config, shape: Shape) -> int:
    """Longest sequences that a worker's KV cache holds."""
    return int(config.rollout.kv_cache_mb * MIB // sequence_kv_bytes(config, shape))


def update_seconds(config: Config, shape: Shape, device: Device) -> float:
    """Every optimizer step of a sampling batch: forward and backward, what is recomputed, reference, pi_old, AdamW."""
    learner, ranks = config.learner, config.cluster.learner_ranks
    length = PROMPT_SHARE * config.data.max_prompt_tokens + mean_completion(config)
    tokens = config.completions_per_batch * learner.epochs_per_batch * length / ranks
    attention = 2 * shape.layers * shape.query_width * length  # scores and values, of a causal half
    forward = 2 * shape.multiplied_parameters + attention
    passes = 3.0 + (1.0 if config.model.gradient_checkpointing else 0.0)
    if config.model.lora_rank:
        passes -= 1.0  # no gradient of the base's weights
    passes += 1.0 if learner.needs_reference else 0.0
    if config.updates_per_batch > 1 or config.cluster.resolved_max_staleness:
        passes += 1.0 / learner.epochs_per_batch
    rate = LEARN_SHARE * device.flops(config.model.dtype)
    return tokens * passes * forward / rate + config.updates_per_batch * _step_seconds(config, shape, device)


def _step_seconds(config: Config, shape: Shape, device: Device) -> float:
    """Reading and writing masters and states once; the gradients' way over the link; with an offloaded optimizer all
    of it at the CPU's pace."""
    learner, ranks = config.learner, config.cluster.learner_ranks
    trained = trained_parameters(config, shape)
    shard = trained / ranks if learner.zero_stage else trained
    traffic = 2 * (4 + OPTIMIZER_BYTES[learner.optimizer]) * shard
    slow = learner.optimizer == "adamw_cpu" and not device.is_cpu
    bandwidth = LINK_SHARE * device.link if slow else DECODE_SHARE * device.bandwidth
    exchanged = 2 * WEIGHT_BYTES[config.model.dtype] * trained * (ranks - 1) / ranks
    return traffic / bandwidth + exchanged / (LINK_SHARE * device.link)


def sync_seconds(config: Config, shape: Shape, device: Device) -> float:
    """The whole model over the link, or on one device through its memory; buckets arrive everywhere at once."""
    size = WEIGHT_BYTES[config.model.dtype] * shape.parameters
    same = config.cluster.resolved_placement == "colocated"
    return 3 * size / (DECODE_SHARE * device.bandwidth) if same else size / (LINK_SHARE * device.link)
