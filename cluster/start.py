"""Starts the actors of a run and wires learner to workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle

from actors.engine import BLOCK_SIZE, Device, EngineOptions, environment
from actors.rollout_pool import RolloutPool
from actors.rollout_worker import RolloutWorker
from actors.verifier import Verifier
from actors.verifier_pool import VerifierPool
from actors.waiting import wait_for
from cluster.learner_group import LearnerGroup
from cluster.placement import Placement, free_port
from cluster.weight_sender import WeightSender
from cluster.weight_sender_cpu import SharedMemorySender
from cluster.weight_sender_cuda import CudaIpcSender, NcclSender
from cluster.weight_transport import CUDA_IPC, SHARED_MEMORY, WORKER_EXTENSION, transport_of
from configs.schema import Config
from learner.rank import LearnerRank, RankOptions

MIB = 2**20
CONCURRENT_CALLS = 4
CLOSE_SECONDS = 20.0
DEVICE: Device = "cpu"  # where the rollout workers' engines compute


@dataclass(frozen=True)
class Actors:
    """Everything Ray hosts for a run."""

    rollouts: RolloutPool
    verifiers: VerifierPool
    learner: LearnerGroup

    def stop(self) -> None:
        """End every actor; whoever does not close in time is killed all the same."""
        actors = [*self.verifiers.verifiers, *self.learner.ranks, *self.rollouts.workers]
        ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=CLOSE_SECONDS)
        for actor in actors:
            ray.kill(actor)


def start_actors(config: Config, placement: Placement, model_path: Path, reference_path: Path, version: int) -> Actors:
    """All actors, side by side, ready to work. RunError naming who did not come up in time.

    model_path: the weights to begin with, of policy `version`; reference_path: the initial model's.
    """
    rollouts = [_rollout(config, placement, model_path, version) for _ in range(config.cluster.rollout_workers)]
    verifiers = [_verifier(config, placement) for _ in range(config.rewards.verifiers)]
    return _ready(config, rollouts, verifiers, _ranks(config, placement, model_path, reference_path))


def start_sampling(config: Config, placement: Placement, model_path: Path) -> Actors:
    """Rollout workers and verifiers without learner ranks, for an evaluation; errors are those of `start_actors`."""
    rollouts = [_rollout(config, placement, model_path, 0) for _ in range(config.cluster.rollout_workers)]
    verifiers = [_verifier(config, placement) for _ in range(config.rewards.verifiers)]
    return _ready(config, rollouts, verifiers, [])


def _ready(
    config: Config, rollouts: list[ActorHandle], verifiers: list[ActorHandle], ranks: list[ActorHandle]
) -> Actors:
    for who, actors in (("rollout worker", rollouts), ("learner rank", ranks), ("verifier", verifiers)):
        references = [actor.ready.remote() for actor in actors]
        option = "cluster.deadline_seconds"
        wait_for(references, config.cluster.deadline_seconds, f"A {who} (starting)", option)
    pool = RolloutPool(rollouts, config.cluster.deadline_seconds)
    return Actors(pool, VerifierPool(verifiers), LearnerGroup(ranks, config.cluster.deadline_seconds))


def connect_weights(config: Config, actors: Actors) -> None:
    """Give the learner its way to the rollout workers."""
    actors.learner.call("connect", weight_sender(config, actors.rollouts))


def weight_sender(config: Config, rollouts: RolloutPool) -> WeightSender:
    """The learner's end of the transport that `engine_options` gives the workers."""
    transport, bucket_bytes = _transport(config), config.cluster.sync_bucket_mb * MIB
    if transport == SHARED_MEMORY:
        return SharedMemorySender(rollouts.weight_transfer, bucket_bytes)
    if transport == CUDA_IPC:
        return CudaIpcSender(rollouts.weight_transfer, bucket_bytes)
    return NcclSender(rollouts.weight_transfer, bucket_bytes, len(rollouts.workers), config.rollout.tensor_parallel)


def _transport(config: Config) -> str:
    return transport_of(DEVICE, config.cluster.resolved_placement)


def engine_options(config: Config, model_path: Path) -> EngineOptions:
    """What the config says of a rollout worker's engine."""
    return EngineOptions(
        model_path=model_path,
        dtype=config.model.dtype,
        max_tokens=config.max_tokens,
        max_running=config.rollout.max_running,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=config.rollout.kv_cache_mb * MIB,
        transport=_transport(config),
        worker_extension=WORKER_EXTENSION,
        tensor_parallel=config.rollout.tensor_parallel,
        device=DEVICE,
        sleeps=DEVICE == "cuda" and config.cluster.resolved_placement == "colocated",
    )


def _rollout(config: Config, placement: Placement, model_path: Path, version: int) -> ActorHandle:
    options = {
        "num_cpus": placement.rollout_cpus,
        "max_concurrency": CONCURRENT_CALLS,
        "runtime_env": {"env_vars": environment(DEVICE)},
    }
    actor = ray.remote(RolloutWorker).options(**options)
    return actor.remote(engine_options(config, model_path), config.cluster.deadline_seconds, version)


def _verifier(config: Config, placement: Placement) -> ActorHandle:
    actor = ray.remote(Verifier).options(num_cpus=placement.verifier_cpus)
    return actor.remote(config.rewards, config.rollout.max_completion_tokens)


def _ranks(config: Config, placement: Placement, model_path: Path, reference_path: Path) -> list[ActorHandle]:
    port, count = free_port(), config.cluster.learner_ranks
    threads = {"OMP_NUM_THREADS": str(placement.learner_threads), "DS_ACCELERATOR": "cpu"}
    actor = ray.remote(LearnerRank).options(num_cpus=placement.learner_cpus, runtime_env={"env_vars": threads})
    return [
        actor.remote(
            config,
            RankOptions(
                rank=rank,
                ranks=count,
                address="127.0.0.1",
                port=port,
                threads=placement.learner_threads,
                model_path=model_path,
                reference_path=reference_path,
                total_updates=config.training.steps * config.updates_per_batch,
            ),
        )
        for rank in range(count)
    ]
