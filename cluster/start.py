"""Starts the actors of a run and wires learner to workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.allocator import allocator_environment
from actors.crew import OPTION, Crew
from actors.engine import BLOCK_SIZE, ONEDNN_ENVIRONMENT, Device, EngineOptions, environment
from actors.restarts import Restarts
from actors.rollout_pool import RolloutPool
from actors.rollout_worker import RolloutWorker
from actors.verifier import Verifier
from actors.verifier_pool import VerifierPool
from actors.waiting import ask, wait_for
from cluster.heartbeats import Heartbeats, watched
from cluster.learner_group import LearnerGroup
from cluster.placement import Placement
from cluster.reservation import Reservation
from cluster.weight_sender import WeightSender
from cluster.weight_sender_cpu import SharedMemorySender
from cluster.weight_sender_cuda import CudaIpcSender, NcclSender
from cluster.weight_transport import CUDA_IPC, SHARED_MEMORY, WORKER_EXTENSION, transport_of
from configs.schema import Config
from learner.rank import LearnerRank, RankOptions

MIB = 2**20
CONCURRENT_CALLS = 8
CLOSE_SECONDS = 20.0


@dataclass(frozen=True)
class Actors:
    """Everything Ray hosts for a run, and what it reserved for it."""

    rollouts: RolloutPool
    verifiers: VerifierPool
    learner: LearnerGroup
    reservation: Reservation
    device: Device
    heartbeats: Heartbeats

    def stop(self) -> None:
        """End every actor; whoever does not close in time is killed all the same."""
        self.heartbeats.close()
        self.rollouts.crew.close()
        self.verifiers.crew.close()
        actors = [*self.verifiers.verifiers, *self.learner.ranks, *self.rollouts.workers]
        ray.wait([ask(actor.close) for actor in actors], num_returns=len(actors), timeout=CLOSE_SECONDS)
        for actor in actors:
            ray.kill(actor)
        self.reservation.release()


def start_actors(
    config: Config,
    placement: Placement,
    model_path: Path,
    reference_path: Path,
    version: int,
    base_path: Path,
    restarts: Restarts,
    say: Callable[[str], None],
) -> Actors:
    """All actors, side by side, ready to work, and watched; an evaluation's placement has no learner ranks.

    model_path: the weights to begin with, of policy `version`; reference_path: the initial model's; base_path: what
    a rollout worker that is started again loads before it gets the current weights. RunError naming who did not
    come up in time.
    """
    reservation = Reservation(placement)
    try:
        device = reservation.device
        seconds = config.cluster.deadline_seconds

        def rollout(place: int, path: Path = base_path) -> ActorHandle:
            return start_rollout(config, reservation.options(placement.rollouts[place]), path, version, device)

        def verifier(place: int) -> ActorHandle:
            return start_verifier(config, reservation.options(placement.verifiers[place]))

        workers = [rollout(place, model_path) for place in range(len(placement.rollouts))]
        rollouts = Crew("rollout worker", workers, seconds, rollout, restarts)
        places = range(len(placement.verifiers))
        verifiers = Crew("verifier", [verifier(place) for place in places], seconds, verifier, restarts)
        ranks = _ranks(config, placement, reservation, model_path, reference_path, device)
        for who, actors in ((rollouts.kind, workers), ("learner rank", ranks), (verifiers.kind, verifiers.actors)):
            references = [ask(actor.ready) for actor in actors]
            wait_for(references, seconds, f"A {who} (starting)", OPTION)
    except BaseException:  # whatever kept an actor from coming up, the resources are free again
        reservation.release()
        raise
    members = {rollouts.kind: rollouts.ready, verifiers.kind: verifiers.ready, "learner rank": lambda: ranks}
    heartbeats = Heartbeats(config.cluster.heartbeat_seconds, members, say)
    pools = RolloutPool(rollouts), VerifierPool(verifiers), LearnerGroup(ranks, seconds)
    return Actors(*pools, reservation, device, heartbeats)


def connect_weights(config: Config, actors: Actors) -> None:
    """Give the learner its way to the rollout workers, and the pool a way to have the weights sent anew. From now on
    nobody is replaced who would work for a learner that is lost."""

    def connect() -> None:
        actors.learner.call("connect", weight_sender(config, actors.rollouts, actors.device))

    def renew() -> dict[str, float]:
        connect()
        return actors.learner.sync_weights()

    connect()
    actors.rollouts.renew = renew
    for crew in (actors.rollouts.crew, actors.verifiers.crew):
        crew.check_needed = actors.learner.check_alive


def weight_sender(config: Config, rollouts: RolloutPool, device: Device = "cpu") -> WeightSender:
    """The learner's end of the transport that `engine_options` gives the workers."""
    transport = transport_of(device, config.cluster.resolved_placement)
    bucket_bytes, call = config.cluster.sync_bucket_mb * MIB, rollouts.calls().weight_transfer
    workers = len(rollouts.workers)
    if transport == SHARED_MEMORY:
        return SharedMemorySender(call, bucket_bytes, workers * config.rollout.tensor_parallel)
    if transport == CUDA_IPC:
        return CudaIpcSender(call, bucket_bytes)
    return NcclSender(call, bucket_bytes, workers, config.rollout.tensor_parallel)


def engine_options(config: Config, model_path: Path, device: Device = "cpu") -> EngineOptions:
    """What the config says of a rollout worker's engine."""
    placement = config.cluster.resolved_placement
    return EngineOptions(
        model_path=model_path,
        dtype=config.model.dtype,
        max_tokens=config.max_tokens,
        max_running=config.rollout.max_running,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=config.rollout.kv_cache_mb * MIB,
        transport=transport_of(device, placement),
        worker_extension=WORKER_EXTENSION,
        tensor_parallel=config.rollout.tensor_parallel,
        device=device,
        sleeps=device == "cuda" and placement == "colocated" and config.cluster.learner_ranks > 0,
    )


def start_rollout(
    config: Config, where: Mapping[str, Any], model_path: Path, version: int, device: Device = "cpu"
) -> ActorHandle:
    """A rollout worker. where: `.options()` that say what of Ray's resources it takes."""
    env_vars = {**environment(device), **(allocator_environment("keeps") if device == "cpu" else {})}
    options = {"max_concurrency": CONCURRENT_CALLS, "runtime_env": {"env_vars": env_vars}}
    actor = watched(RolloutWorker).options(**options, **where)
    return actor.remote(engine_options(config, model_path, device), config.cluster.deadline_seconds, version)


def start_verifier(config: Config, where: Mapping[str, Any]) -> ActorHandle:
    """A verifier, likewise."""
    actor = watched(Verifier).options(**where)
    return actor.remote(config.rewards, config.rollout.max_completion_tokens)


def _ranks(
    config: Config,
    placement: Placement,
    reservation: Reservation,
    model_path: Path,
    reference_path: Path,
    device: Device,
) -> list[ActorHandle]:
    if not placement.ranks:
        return []
    address, port = reservation.address(placement.ranks[0])
    env_vars = {"OMP_NUM_THREADS": str(placement.learner_threads), **ONEDNN_ENVIRONMENT}
    if device == "cpu":
        env_vars |= allocator_environment("gives back")
    actor = watched(LearnerRank)
    return [
        actor.options(runtime_env={"env_vars": env_vars}, **reservation.options(seat)).remote(
            config,
            RankOptions(
                rank=rank,
                ranks=len(placement.ranks),
                address=address,
                port=port,
                threads=placement.learner_threads,
                model_path=model_path,
                reference_path=reference_path,
                total_updates=config.training.steps * config.updates_per_batch,
            ),
        )
        for rank, seat in enumerate(placement.ranks)
    ]
