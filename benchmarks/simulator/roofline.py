"""Rates of GPUs that nobody has measured here: datasheet figures times assumed shares of them. Projections, no more."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.simulator.rates import Rates

MIB = 2**20
BYTES = 2  # of a bfloat16
DECODE_SHARE = 0.6  # of the memory's bandwidth
PREFILL_SHARE = 0.5  # of the peak FLOP/s
LEARN_SHARE = 0.35
LINK_SHARE = 0.5
KERNEL_SECONDS = 6e-6  # an eager layer launches about
KERNELS_PER_LAYER = 15
SCHEDULER_SECONDS = 3e-3  # of vLLM for a decode step
CACHE_SHARE = 0.85  # of what the weights leave of a sampling GPU's memory
PASSES = 8  # FLOPs of a learnt token for each parameter: forward, recomputed, and twice backward, 2 each
OPTIMIZER_BYTES = 2 * (4 + 2)  # read and written for each parameter of a shard: the fp32 master, two 8-bit moments
TOKENS_PER_MICRO_BATCH = 16384
BUCKET = 64 * MIB


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 FLOP/s; bytes/s of memory, one way to neighbours and to other nodes; bytes; GPUs of a node."""

    name: str
    flops: float
    bandwidth: float
    link: float
    network: float
    memory: float
    node: int


# NVIDIA's datasheets; A40 by PCIe 4.0 x16. Between nodes: 25 and 400 Gbit/s a GPU, as clouds offer them.
A40 = Gpu("A40", 149.7e12, 696e9, 32e9, 3e9, 48e9, node=4)
H100 = Gpu("H100", 989e12, 3350e9, 450e9, 50e9, 80e9, node=8)


@dataclass(frozen=True)
class Model:
    """parameters in all, those that a token is multiplied with, and bytes of its keys and values for a token."""

    name: str
    parameters: float
    multiplied: float
    layers: int
    cache: float


# Qwen2 of 28 layers, 2 heads for keys and values of width 128; input and output matrix untied.
R1_QWEN_1_5B = Model("DeepSeek-R1-Distill-Qwen-1.5B", 1.78e9, 1.54e9, 28, 28 * 2 * 2 * 128 * BYTES)


def gpu_rates(gpu: Gpu, model: Model, driver: Rates, call: float, setup: Setup) -> Rates:
    """driver: what was measured of the driver, the verifiers and the cutting of batches; call: a call of a worker."""
    link = LINK_SHARE * (gpu.link if setup.gpus <= gpu.node else gpu.network)
    decode_bandwidth = DECODE_SHARE * gpu.bandwidth
    prefill = 2 * model.multiplied / (PREFILL_SHARE * gpu.flops)
    size = BYTES * model.parameters
    micro_batches = max(1.0, setup.tokens / setup.ranks / TOKENS_PER_MICRO_BATCH)
    shard = model.parameters / setup.ranks
    launches = SCHEDULER_SECONDS + model.layers * KERNELS_PER_LAYER * KERNEL_SECONDS
    calls = 2 + size / BUCKET
    return replace(
        driver,
        submit=0.0,
        decode=max(launches, BYTES * model.multiplied / decode_bandwidth),
        running=prefill,
        context=model.cache / decode_bandwidth,
        start=setup.prompt_tokens * prefill,
        update=2 * OPTIMIZER_BYTES * shard / decode_bandwidth,
        token=PASSES * model.multiplied / (LEARN_SHARE * gpu.flops),
        exchange=(micro_batches + 1) / 2 * size / link,  # ZeRO-2: every micro-batch's gradients, then the weights
        probe=0.0,
        push=size / link + calls * call,
        push_worker=calls * call,
        beside=1.0,
    )


@dataclass(frozen=True)
class Setup:
    """What the rates depend on. tokens: of an update batch; prompt_tokens: of a prompt."""

    gpus: int
    ranks: int
    tokens: float
    prompt_tokens: float


def cache_tokens(gpu: Gpu, model: Model) -> float:
    """Tokens that the KV cache of a sampling GPU holds."""
    return CACHE_SHARE * (gpu.memory - BYTES * model.parameters) / model.cache


def sampled_per_second(rates: Rates, running: int, context: float) -> float:
    """Tokens a second of a worker that decodes so many completions, each looking back on so many tokens."""
    return running / (rates.decode + running * (rates.running + rates.context * context))
