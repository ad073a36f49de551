"""A run whose sides work at the same time on one GPU; takes run_local's command line.

`cluster.placement=disaggregated` gives each side GPUs of its own. Here they share the first one without taking turns,
so that sampling ahead can be tried, and its overlap measured, where there is one GPU. Weights go by CUDA IPC, as NCCL
connects no two processes on one GPU. On a CPU it is the placement that a run has anyway.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import cluster.session
import cluster.start
from actors.engine import Device
from cluster.nodes import Node
from cluster.placement import Placement, Seat, arrange
from cluster.terminal import escape_crashes
from cluster.train import main
from cluster.weight_transport import transport_of
from configs.schema import Config


def place(config: Config, nodes: Sequence[Node]) -> Placement:
    """In the place of `cluster.placement.place`."""
    apart = arrange(config, 0, os.cpu_count() or 1)
    return on_one_gpu(apart) if any(node.resources.get("GPU") for node in nodes) else apart


def on_one_gpu(apart: Placement) -> Placement:
    """One rollout worker and one learner rank in one bundle with one GPU, half of it each; verifiers as they were."""
    (rank,), (rollout,) = apart.ranks, apart.rollouts
    shared = {"CPU": rank.cpus + rollout.cpus, "GPU": 1.0}
    return replace(
        apart,
        bundles=(shared, *(apart.bundles[seat.bundle] for seat in apart.verifiers)),
        ranks=(Seat(0, rank.cpus, 0.5),),
        rollouts=(Seat(0, rollout.cpus, 0.5),),
        verifiers=tuple(Seat(1 + number, seat.cpus) for number, seat in enumerate(apart.verifiers)),
    )


def transport(device: Device, placement: Literal["colocated", "disaggregated"]) -> str:
    """In the place of `transport_of`: what a shared GPU takes, whatever the placement is called."""
    return transport_of(device, "colocated")


if __name__ == "__main__":
    escape_crashes()
    cluster.session.place = place
    cluster.start.transport_of = transport
    sys.exit(main(prog="python -m benchmarks.gpu_stages.side_by_side"))
