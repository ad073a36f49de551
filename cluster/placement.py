"""Who sits where: the bundles of one Ray placement group, and which part of which bundle an actor takes.

GPUs are Ray's logical ones, so a cluster without any real GPU can be told that it has some, and every
placement is tested on a CPU. Without GPUs only small shares of CPUs are asked for; threads are set by each actor.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.nodes import Node
from cluster.shortfall import shortfall
from configs.errors import UsageError
from configs.schema import Config

ROLLOUT_CPUS = 0.4
LEARNER_CPUS = 0.4
VERIFIER_CPUS = 0.2

Bundle = Mapping[str, float]


@dataclass(frozen=True)
class Seat:
    """An actor's part of the placement group: a bundle's index, and logical CPUs and GPUs in it."""

    bundle: int
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Placement:
    """What is asked of Ray, who sits in it, the torch threads of a learner rank, and why it is so."""

    kind: Literal["colocated", "disaggregated"]
    reason: str
    bundles: tuple[Bundle, ...]
    ranks: tuple[Seat, ...]
    rollouts: tuple[Seat, ...]
    verifiers: tuple[Seat, ...]
    learner_threads: int

    def __str__(self) -> str:
        on = f"{sum(bundle.get('GPU', 0) for bundle in self.bundles):g} GPUs" if self.on_gpus else "the CPU"
        sides = f"{_count(self.rollouts, 'rollout worker')} and {_count(self.ranks, 'learner rank')}"
        how = f"take turns on {on}" if self.kind == "colocated" else f"work side by side on {on}"
        threads = f"{self.learner_threads} thread{'s' * (self.learner_threads > 1)} a rank"
        return f"placement: {self.kind}, because {self.reason}: {sides} {how}, {threads}"

    @property
    def on_gpus(self) -> bool:
        return any("GPU" in bundle for bundle in self.bundles)


def place(config: Config, nodes: Sequence[Node]) -> Placement:
    """The placement of this config on these nodes.

    UsageError, before any actor starts, if the actors ask for what the nodes have not.
    """
    gpus = sum(int(node.resources.get("GPU", 0)) for node in nodes)
    placement = arrange(config, gpus, os.cpu_count() or 1)
    there = {node.name: {kind: node.resources.get(kind, 0.0) for kind in ("CPU", "GPU")} for node in nodes}
    if missing := shortfall(placement.bundles, there, f"Lower {_largest(placement)}, or add nodes."):
        raise UsageError(missing)
    return placement


def arrange(config: Config, gpus: int, cores: int) -> Placement:
    """Bundles and seats of this config where there are so many GPUs (none: all on the CPU) and cores.

    UsageError if the GPUs do not suffice for both sides.
    """
    kind, parallel = config.cluster.resolved_placement, config.rollout.tensor_parallel
    workers, ranks = config.cluster.rollout_workers, config.cluster.learner_ranks
    if gpus:
        _check_gpus(config, gpus)
    if gpus and kind == "colocated" and ranks:
        bundles, rank_seats, rollout_seats = _shared_gpus(workers, ranks)
    else:
        own = float(bool(gpus))
        rank_seats = [Seat(i, LEARNER_CPUS, own) for i in range(ranks)]
        rollout_seats = [Seat(ranks + i, ROLLOUT_CPUS * parallel, own * parallel) for i in range(workers)]
        bundles = [_bundle(seat) for seat in (*rank_seats, *rollout_seats)]
    verifier_seats = [Seat(len(bundles) + i, VERIFIER_CPUS) for i in range(config.rewards.verifiers)]
    return Placement(
        kind=kind,
        reason=_reason(config),
        bundles=(*bundles, *map(_bundle, verifier_seats)),
        ranks=tuple(rank_seats),
        rollouts=tuple(rollout_seats),
        verifiers=tuple(verifier_seats),
        learner_threads=learner_threads(config, cores),
    )


def _shared_gpus(workers: int, ranks: int) -> tuple[list[Bundle], list[Seat], list[Seat]]:
    """A bundle for every rank's GPU; the rollout workers share them, each GPU half the rank's, half its workers'."""
    most = -(-workers // ranks)
    rank_seats = [Seat(i, LEARNER_CPUS, 0.5) for i in range(ranks)]
    rollout_seats = [Seat(i % ranks, ROLLOUT_CPUS, 0.5 / most) for i in range(workers)]
    bundles: list[Bundle] = [{"CPU": LEARNER_CPUS + most * ROLLOUT_CPUS, "GPU": 1.0} for _ in range(ranks)]
    return bundles, rank_seats, rollout_seats


def _bundle(seat: Seat) -> Bundle:
    return {"CPU": seat.cpus, "GPU": seat.gpus} if seat.gpus else {"CPU": seat.cpus}


def _reason(config: Config) -> str:
    cluster = config.cluster
    if cluster.placement != "auto":
        return f"cluster.placement={cluster.placement}"
    if cluster.resolved_placement == "disaggregated":
        return f"cluster.max_staleness={cluster.max_staleness} lets sampling and learning go on at once"
    return "on-policy the two sides wait for each other, so each may have all there is"


def _check_gpus(config: Config, gpus: int) -> None:
    cluster, parallel = config.cluster, config.rollout.tensor_parallel
    workers, ranks = cluster.rollout_workers, cluster.learner_ranks
    sampling = workers * parallel
    here = f"Ray has {gpus} GPU{'s' * (gpus > 1)}"
    if ranks > gpus:
        raise UsageError(f"cluster.learner_ranks={ranks} asks for a GPU each and {here}. Lower it to {gpus}.")
    if cluster.resolved_placement == "colocated" and ranks:
        if parallel > 1:
            raise UsageError(
                f"rollout.tensor_parallel={parallel} gives a rollout worker whole GPUs, and colocated it shares one "
                "with a learner rank. Set rollout.tensor_parallel=1, or cluster.placement=disaggregated."
            )
        if config.learner.zero_stage == 3 and config.learner.eight_bit:
            raise UsageError(
                f"learner.zero_stage=3 with learner.optimizer={config.learner.optimizer} cannot leave a GPU while the "
                "rollout worker on it samples. Set learner.zero_stage=2, learner.optimizer=adamw_cpu, "
                "or cluster.placement=disaggregated."
            )
        return
    if ranks + sampling <= gpus:
        return
    asked = f"cluster.rollout_workers={workers} x rollout.tensor_parallel={parallel}"
    if ranks == gpus:
        raise UsageError(
            f"{here}, cluster.learner_ranks={ranks} takes all of them and none is left for sampling. Lower "
            "cluster.learner_ranks, or set cluster.placement=colocated."
        )
    raise UsageError(
        f"Sampling asks for {sampling} GPUs ({asked}), cluster.learner_ranks={ranks} for {ranks}, and {here}. Lower "
        f"cluster.rollout_workers to {max(1, (gpus - ranks) // parallel)}."
    )


def _largest(placement: Placement) -> str:
    """The option whose actors ask for most CPUs."""
    asked = {
        "cluster.rollout_workers": placement.rollouts,
        "cluster.learner_ranks": placement.ranks,
        "rewards.verifiers": placement.verifiers,
    }
    return max(asked, key=lambda option: sum(seat.cpus for seat in asked[option]))


def learner_threads(config: Config, cores: int) -> int:
    """Torch threads of a learner rank: as configured, or the cores that sampling leaves, shared out among the ranks."""
    cluster = config.cluster
    if config.learner.threads != "auto":
        return config.learner.threads
    if cluster.resolved_placement == "disaggregated":
        cores -= cluster.rollout_workers * config.rollout.tensor_parallel
    return max(1, cores // max(1, cluster.learner_ranks))  # an evaluation has no ranks


def _count(seats: Sequence[Seat], what: str) -> str:
    return f"{len(seats)} {what}{'s' * (len(seats) != 1)}"


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
