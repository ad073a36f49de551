"""Bytes of a learner rank and of a rollout worker by what they are for, phase by phase.

The learner's follow DeepSpeed 0.19's wrappers: without ZeRO fp32 weights are their own masters and bfloat16 ones
have fp32 copies; under ZeRO 1 to 3 every type has a flat fp32 copy, sharded over the ranks, and so have its
gradients at the step. The rollout worker's follow vLLM 0.32 in eager mode.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine import batched_tokens
from cluster.hardware import MIB, Device
from cluster.model_shape import Shape
from configs.schema import Config

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
REDUCE_BUCKET = 5e8  # elements of DeepSpeed's gradient bucket, which a GPU allocates whole
LIVE_PARAMETERS = 1e9  # elements that ZeRO-3 leaves gathered
SUB_GROUP = 1e9  # elements that ZeRO-3 steps at a time
EIGHT_BIT = 2 * (1 + 4 / 256)  # two moments and their scales
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_cpu": 8.0, "adamw_8bit": EIGHT_BIT, "paged_adamw_8bit": EIGHT_BIT}
# What a step needs beside states and gradient, per element: torch's AdamW a root or, on a CPU, two; bitsandbytes
# steps in place on a GPU and in whole fp32 copies on a CPU.
STEP_BYTES = {"adamw": {"cuda": 4, "cpu": 8}, "8-bit": {"cuda": 0, "cpu": 20}}
BLOCK = 32  # tokens of a block of the KV cache

Parts = dict[str, float]


@dataclass(frozen=True)
class Process:
    """Bytes of one process by name: `held` all the time, `phases` beside that, one after the other, and `host` in the
    CPU's memory where the process is on a GPU."""

    held: Parts
    phases: dict[str, Parts]
    host: Parts

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + max(sum(parts.values()) for parts in self.phases.values())


# -- learner rank ---------------------------------------------------------------------------------


def learner_rank(config: Config, shape: Shape, device: Device) -> Process:
    """Rank 0, which also gathers what is synced and saved."""
    learner, ranks = config.learner, config.cluster.learner_ranks
    width = WEIGHT_BYTES[config.model.dtype]
    whole, trained = shape.parameters, trained_parameters(config, shape)
    shard = trained / ranks if learner.zero_stage else float(trained)
    own_masters = learner.zero_stage == 0 and width == 4
    gathered = min(whole, LIVE_PARAMETERS) if ranks > 1 else 0.0
    held = {
        "process": device.learner_base,
        "weights": width * (whole / ranks + gathered if learner.zero_stage == 3 else float(whole)),
    }
    if config.model.lora_rank:
        held["weights"] += width * trained
    if learner.needs_reference and not config.model.lora_rank:
        held["reference"] = float(width * whole)
    states = {
        "fp32 masters": 0.0 if own_masters else 4 * shard,
        "optimizer": OPTIMIZER_BYTES[learner.optimizer] * shard,
    }
    copies = {"saved weights": float(width * whole), "saved state": 4 * shard + states["optimizer"]}  # of a checkpoint
    offloaded = learner.optimizer == "adamw_cpu"
    if not offloaded:
        held |= states
    phases = {
        "backward": _gradients(config, trained, shard, device)
        | {"activations": activations(config, shape, device), "logits": logits(config, shape)},
        "step": _step(config, shape, trained, shard, device),
    }
    host: Parts = dict(copies)
    if offloaded:  # gradients in the model's type and in fp32, and the new weights before they go back
        host |= states | {"gradients": (4 + 2 * width) * shard, "step": 8 * shard}
    if not device.is_cpu:
        return Process(held, phases, host)
    held |= {name: size for name, size in host.items() if name in states}
    if offloaded:
        phases["step"] = {"gradients": host["gradients"], "step": host["step"]}
        phases["backward"]["gradients"] += host["gradients"]
    held["checkpoint copies"] = sum(copies.values())  # kept from the first save on
    return Process(held, phases, {})


def trained_parameters(config: Config, shape: Shape) -> int:
    return shape.adapter_parameters(config.model.lora_rank) if config.model.lora_rank else shape.parameters


def update_tokens(config: Config) -> float:
    """Tokens, at most, that a rank sees in an update."""
    return config.completions_per_update * config.max_tokens / config.cluster.learner_ranks


def _gradients(config: Config, trained: int, shard: float, device: Device) -> Parts:
    """At the end of a backward pass: those accumulated, those of this micro-batch, and the bucket they come through."""
    width, stage = WEIGHT_BYTES[config.model.dtype], config.learner.zero_stage
    if stage <= 1:
        return {"gradients": float(width * trained)}
    bucket = width * (min(trained, REDUCE_BUCKET) if device.is_cpu else REDUCE_BUCKET)
    if config.learner.optimizer == "adamw_cpu":
        return {"gradients": 0.0, "gradient bucket": bucket}
    several = update_tokens(config) > config.learner.tokens_per_micro_batch
    accumulated = 2 if stage == 2 and several else 1
    return {"gradients": accumulated * width * shard, "gradient bucket": bucket}


def _step(config: Config, shape: Shape, trained: int, shard: float, device: Device) -> Parts:
    """The larger of two moments: gradients are made flat and fp32; the optimizer computes, beside those before."""
    width, stage, optimizer = WEIGHT_BYTES[config.model.dtype], config.learner.zero_stage, config.learner.optimizer
    if optimizer == "adamw_cpu":
        return {"step": 0.0}
    rooms = STEP_BYTES["8-bit" if config.learner.eight_bit else "adamw"]["cpu" if device.is_cpu else "cuda"]
    if stage == 0:
        largest = max(shape.embedding_parameters, shape.width * shape.mlp_width)
        return {"gradients": float((width + (4 if width == 2 else 0)) * trained), "step": float(rooms * largest)}
    part = min(shard, SUB_GROUP) if stage == 3 else shard
    gradients = width * (trained if stage == 1 else shard)
    bucket = width * (min(trained, REDUCE_BUCKET) if device.is_cpu else REDUCE_BUCKET) if stage == 3 else 0.0
    flattening = gradients + (width + (4 if width == 2 else 0)) * part
    stepping = (4 + rooms) * part + gradients
    return {"gradients": 4 * part, "gradient bucket": bucket, "step": max(flattening, stepping) - 4 * part}


def micro_batch_tokens(config: Config) -> float:
    return min(config.learner.tokens_per_micro_batch, update_tokens(config))


def activations(config: Config, shape: Shape, device: Device) -> float:
    """What the backward pass of one micro-batch needs, and the mask between the completions of a row, where there is
    one: variable-length attention, in 16 bits on a GPU, needs none."""
    width, tokens = WEIGHT_BYTES[config.model.dtype], micro_batch_tokens(config)
    upcast = 4 * (4 - width) * shape.width  # norms compute in fp32
    layer = width * (6 * shape.width + 4 * shape.query_width + 2 * shape.kv_width + 4 * shape.mlp_width) + upcast
    if config.model.lora_rank:
        layer += width * 7 * shape.width  # inputs of A, cast to its type
    inside = width * (2 * shape.mlp_width + 4 * shape.width)  # gradients on their way through a layer
    kept = shape.layers * width * shape.width + layer if config.model.gradient_checkpointing else shape.layers * layer
    masked = config.learner.packing and (device.is_cpu or width == 4)
    mask = config.max_tokens * (1 + width) if masked else 0
    return float(tokens * (kept + inside + mask))


def logits(config: Config, shape: Shape) -> float:
    """Of one chunk: divided by the temperature, normalised, their exponentials, and the gradient."""
    rollout, width = config.rollout, WEIGHT_BYTES[config.model.dtype]
    each = 16 + (width if width == 2 else 0)
    if rollout.top_p < 1:
        each += 24  # sorted, their order, cumulated, and the mask
    elif rollout.top_k:
        each += 9
    return float(min(config.learner.logprob_chunk_tokens, micro_batch_tokens(config)) * shape.vocabulary * each)


# -- rollout worker -------------------------------------------------------------------------------


def kv_bytes_per_token(config: Config, shape: Shape) -> float:
    """On each of the GPUs that share the worker's model."""
    heads = max(1.0, shape.kv_heads / config.rollout.tensor_parallel)
    return 2 * shape.layers * heads * shape.head_width * WEIGHT_BYTES[config.model.dtype]


def sequence_kv_bytes(config: Config, shape: Shape) -> float:
    """Of one longest sequence, in whole blocks."""
    blocks = -(-config.max_tokens // BLOCK) + 1
    return blocks * BLOCK * kv_bytes_per_token(config, shape)


def rollout_worker(config: Config, shape: Shape, device: Device) -> Process:
    """One GPU of a rollout worker, or all of it on a CPU."""
    rollout, width = config.rollout, WEIGHT_BYTES[config.model.dtype]
    share, processes = (1, rollout.tensor_parallel) if device.is_cpu else (rollout.tensor_parallel, 1)
    weights = width * shape.parameters / share
    if device.is_cpu:  # linear layers are packed anew, and the heap keeps the room they had; so is a tied head
        weights += width * shape.layers * shape.layer_parameters
        weights += width * shape.embedding_parameters if shape.tied else 0
    tokens = min(
        batched_tokens(config.max_tokens, rollout.max_running, "cpu" if device.is_cpu else "cuda"),
        rollout.max_running * config.max_tokens,
    )
    prefill = tokens * width * (3 * shape.mlp_width / share + 4 * shape.width)
    sampler = rollout.max_running * shape.vocabulary * (12 + (12 if rollout.top_k or rollout.top_p < 1 else 0))
    held = {
        "process": device.rollout_base,
        "weights": weights,
        "KV cache": float(rollout.kv_cache_mb * MIB * processes),
    }
    phases = {
        "sampling": {"prefill and sampler": float(max(prefill, sampler))},
        "sync": {"sync bucket": 2 * bucket(config, shape)},
    }
    return Process(held, phases, {})


def bucket(config: Config, shape: Shape) -> float:
    """Bytes of the weight sync's bucket: as configured, at most the model, at least its largest tensor."""
    width = WEIGHT_BYTES[config.model.dtype]
    largest = width * max(shape.embedding_parameters, shape.width * shape.mlp_width)
    return float(min(width * shape.parameters, max(config.cluster.sync_bucket_mb * MIB, largest)))
