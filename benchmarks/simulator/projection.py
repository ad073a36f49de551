"""Clusters of GPUs, simulated: what a step takes, who waits for whom, and what of it is the driver's doing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean

from benchmarks.simulator.lengths import LogNormal
from benchmarks.simulator.rates import Rates
from benchmarks.simulator.roofline import (
    A40,
    H100,
    R1_QWEN_1_5B,
    Gpu,
    Setup,
    cache_tokens,
    gpu_rates,
    sampled_per_second,
)
from benchmarks.simulator.scenario import Outcome, Scenario
from benchmarks.simulator.simulation import simulate

PROMPT_TOKENS = 200.0
GROUP = 16
COUNTED = 4  # steps of a projection that count
DRIVER = ("hand", "hand_actor", "hand_token", "step", "record", "record_token", "share", "share_square")
REASONING = LogNormal(2500, 0.7, 8192)
MODEL = R1_QWEN_1_5B
VERIFY = 1 / 426  # an ordinary answer to a maths problem, by `python -m benchmarks.verifier`


@dataclass(frozen=True)
class Cluster:
    """GPUs that share a batch; staleness 0 is colocated: all of them sample, then all of them learn."""

    gpu: Gpu
    gpus: int
    prompts: int
    max_staleness: int
    lengths: LogNormal = REASONING
    verifiers_per_node: int = 8

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpu.node)


@dataclass(frozen=True)
class Projection:
    """seconds of a step, in it of the push, of the exchange of gradients and of cutting the batch, and of a step whose
    driver and cutting take none; tokens of a step's completions."""

    cluster: Cluster
    scenario: Scenario
    seconds: float
    sync: float
    exchange: float
    cutting: float
    free: float
    tokens: float
    outcome: Outcome

    @property
    def tokens_per_gpu(self) -> float:
        """Trained a second."""
        return self.tokens / self.seconds / self.cluster.gpus


def project(cluster: Cluster, driver: Rates, call: float) -> Projection:
    """Simulate it with the split of GPUs that balances both sides."""
    mean = mean_length(cluster.lengths)
    completions = cluster.prompts * GROUP
    tokens = completions * (mean + PROMPT_TOKENS)
    running = int(min(256, cache_tokens(cluster.gpu, MODEL) / (PROMPT_TOKENS + mean)))
    setup = Setup(cluster.gpus, cluster.gpus, tokens, PROMPT_TOKENS)
    workers = ranks = cluster.gpus
    if cluster.max_staleness:
        rates = gpu_rates(cluster.gpu, MODEL, driver, call, setup)
        ranks = learners(cluster, rates, tokens, mean, running)
        workers = cluster.gpus - ranks
    rates = gpu_rates(cluster.gpu, MODEL, driver, call, replace(setup, ranks=ranks))
    scenario = Scenario(
        cluster.lengths,
        cluster.prompts,
        GROUP,
        max_running=running,
        max_staleness=cluster.max_staleness,
        workers=workers,
        ranks=ranks,
        verifiers=cluster.verifiers_per_node * cluster.nodes,
        prompt_tokens=PROMPT_TOKENS,
        steps=COUNTED + skipped(cluster),
        endless=True,
    )
    outcome = simulate(scenario, rates)
    free = simulate(scenario, replace(rates, **dict.fromkeys(DRIVER, 0.0))).step_seconds(skipped(cluster))
    steps = outcome.steady(skipped(cluster))
    return Projection(
        cluster,
        scenario,
        outcome.step_seconds(skipped(cluster)),
        fmean(step.sync for step in steps),
        rates.exchange * 2 * (ranks - 1) / ranks,
        driver.share * completions + driver.share_square * completions**2,
        free,
        fmean(step.tokens for step in steps),
        outcome,
    )


def skipped(cluster: Cluster) -> int:
    return 1 + 2 * cluster.max_staleness


def learners(cluster: Cluster, rates: Rates, tokens: float, mean: float, running: int) -> int:
    """GPUs that learn, so that both sides take as long; at least one for each."""
    busy = min(running, max(1, cluster.prompts * GROUP // cluster.gpus))
    sampling = tokens / sampled_per_second(rates, busy, PROMPT_TOKENS + mean / 2)
    learning = tokens * rates.token
    return min(cluster.gpus - 1, max(1, round(cluster.gpus * learning / (learning + sampling))))


def mean_length(lengths: LogNormal) -> float:
    return fmean(lengths.draw(Random(0), 20_000))


HEADS = (
    "GPUs", "prompts", "staleness", "sample + learn", "step s", "push s", "exchange s", "cutting s", "free s",
    "tokens/s a GPU", "busy: workers, ranks, verifiers, driver",
)  # fmt: skip


def row(found: Projection) -> str:
    cluster, scenario, busy = found.cluster, found.scenario, found.outcome.busy
    split = f"{scenario.workers} + {scenario.ranks}" if cluster.max_staleness else f"{scenario.workers} in turns"
    shares = ", ".join(f"{100 * busy[who]:.0f}" for who in ("workers", "ranks", "verifiers", "driver"))
    cells = [f"{cluster.gpus} {cluster.gpu.name}", str(cluster.prompts), str(cluster.max_staleness), split]
    cells += [f"{value:.1f}" for value in (found.seconds, found.sync, found.exchange, found.cutting, found.free)]
    cells += [f"{found.tokens_per_gpu:,.0f}", f"{shares} %"]
    return f"| {' | '.join(cells)} |"


def tables() -> dict[str, list[Cluster]]:
    """The clusters of each table of docs/scaling.md."""
    short, long = LogNormal(2500, 0.4, 32768), LogNormal(2500, 1.0, 32768)
    return {
        "One node and two": [Cluster(A40, gpus, 32, stale) for gpus in (4, 8) for stale in (0, 1, 2)],
        "The same batch on more GPUs": [Cluster(H100, gpus, 256, 2) for gpus in (8, 16, 32, 64, 128)],
        "A batch that grows with the GPUs": [Cluster(H100, gpus, 8 * gpus, 2) for gpus in (8, 64, 256, 1024)],
        "The same in turns": [Cluster(H100, gpus, 8 * gpus, 0) for gpus in (8, 64, 256)],
        "Staleness": [Cluster(H100, 64, 512, stale) for stale in (1, 2, 4)],
        "Staleness, lengths of sigma 0.4": [Cluster(H100, 64, 512, stale, short) for stale in (0, 1, 2, 4)],
        "Staleness, lengths of sigma 1.0": [Cluster(H100, 64, 512, stale, long) for stale in (0, 1, 2, 4)],
        "One verifier a node": [Cluster(H100, 64, 512, 2, verifiers_per_node=1)],
    }


def lines(driver: Rates, call: float) -> Iterator[str]:
    """Markdown, a line at a time as it is ready. driver, call: as in `gpu_rates`."""
    driver = replace(driver, verify=VERIFY)
    for title, clusters in tables().items():
        yield f"\n{title}\n\n| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|"
        for cluster in clusters:
            yield row(project(cluster, driver, call))
