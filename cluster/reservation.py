"""The placement group of a run: what its actors need, reserved as a whole before the first one starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.engine import Device
from actors.waiting import wait_for
from cluster.gpu import has_gpu
from cluster.placement import Placement, Seat, free_port
from configs.errors import RunError

LOOPBACK = "127.0.0.1"
WHAT = ("CPU", "GPU")
RESERVE_SECONDS = 60.0
ANSWER_SECONDS = 60.0


class Reservation:
    """A placement's bundles, held in the Ray cluster until `release`. RunError if others hold what it needs."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._group = placement_group([dict(bundle) for bundle in placement.bundles], strategy="PACK")
        try:
            ray.get(self._group.ready(), timeout=RESERVE_SECONDS)
        except GetTimeoutError:
            remove_placement_group(self._group)
            free = ", ".join(f"{value:g} {name}" for name, value in ray.available_resources().items() if name in WHAT)
            raise RunError(
                f"Ray did not reserve {len(placement.bundles)} bundles in {RESERVE_SECONDS:g} s: it has enough, but "
                f"others use it (free now: {free or 'nothing'}). Stop another job (`ray job list`) or wait."
            ) from None

    @property
    def device(self) -> Device:
        """Where the actors compute: GPUs that are only numbers are a CPU."""
        if not self._placement.on_gpus:
            return "cpu"
        (found,) = [has_gpu()] if _one_host() else self._ask(has_gpu, self._placement.rollouts[0])
        return "cuda" if found else "cpu"

    def options(self, seat: Seat) -> dict[str, Any]:
        """`.options()` of an actor or task in this seat."""
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=seat.bundle)
        return {"num_cpus": seat.cpus, "num_gpus": seat.gpus, "scheduling_strategy": strategy}

    def address(self, seat: Seat) -> tuple[str, int]:
        """Host and free port where whoever sits there can be reached by the others; loopback on a single machine."""
        if _one_host():
            return LOOPBACK, free_port()
        ((host, port),) = self._ask(_own_address, seat)
        return host, port

    def _ask(self, function: Callable[[], Any], seat: Seat) -> list[Any]:
        """What the function answers on the node of a seat."""
        options = {**self.options(seat), "num_cpus": 0, "num_gpus": 0}
        task: Callable[[], ray.ObjectRef] = ray.remote(function).options(**options).remote
        return wait_for([task()], ANSWER_SECONDS, "A node that was just reserved", "cluster.deadline_seconds")

    def release(self) -> None:
        remove_placement_group(self._group)


def _one_host() -> bool:
    return len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) == 1


def _own_address() -> tuple[str, int]:
    return ray.util.get_node_ip_address(), free_port()
