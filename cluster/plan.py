"""Whether a config fits a hardware, how long a step takes there, and what to change. Nothing is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from cluster.hardware import GIB, MIB, Hardware
from cluster.memory import Parts, Process, bucket, learner_rank, rollout_worker, sequence_kv_bytes
from cluster.model_shape import Shape
from cluster.phase_times import PhaseTimes, phase_times, sequences_held
from configs.schema import Config

USABLE = 0.95  # of a device's memory; the rest is for fragments and the display
OTHERS = 1.5 * GIB  # of a machine without GPUs: driver and Ray
VERIFIER = 0.4 * GIB  # with its child
KV_STEP_MB = 256

Changes = dict[str, Any]


@dataclass(frozen=True)
class Seat:
    """What shares one device, by phase; `count` devices are alike."""

    name: str
    count: int
    phases: dict[str, Parts]

    @property
    def peak(self) -> float:
        return max(sum(parts.values()) for parts in self.phases.values())


@dataclass(frozen=True)
class Split:
    """GPUs shared out in one way, its times, and whether it fits."""

    changes: Changes
    times: PhaseTimes
    fits: bool

    def __str__(self) -> str:
        workers, ranks = (self.changes[f"cluster.{key}"] for key in ("rollout_workers", "learner_ranks"))
        stale = self.changes["cluster.max_staleness"]
        how = f"staleness up to {stale}" if stale else "on-policy"
        who = f"{_count(workers, 'rollout worker')}, {_count(ranks, 'learner rank')}"
        return f"{self.changes['cluster.placement']}, {who}, {how}"


@dataclass(frozen=True)
class Plan:
    """A config on a hardware. Everything is computed when asked for."""

    config: Config
    shape: Shape
    hardware: Hardware

    @property
    def usable(self) -> float:
        return USABLE * self.hardware.device.memory

    @cached_property
    def learner(self) -> Process:
        return learner_rank(self.config, self.shape, self.hardware.device)

    @cached_property
    def rollout(self) -> Process:
        return rollout_worker(self.config, self.shape, self.hardware.device)

    @cached_property
    def times(self) -> PhaseTimes:
        return phase_times(self.config, self.shape, self.hardware.device)

    @property
    def gpus_asked(self) -> int:
        cluster = self.config.cluster
        sampling = cluster.rollout_workers * self.config.rollout.tensor_parallel
        if cluster.resolved_placement == "colocated":
            return max(sampling, cluster.learner_ranks)
        return sampling + cluster.learner_ranks

    @cached_property
    def seats(self) -> list[Seat]:
        """Who shares a device, phase by phase."""
        cluster, learner, rollout = self.config.cluster, self.learner, self.rollout
        if self.hardware.device.is_cpu:
            whole = {
                "rollout workers": cluster.rollout_workers * rollout.peak,
                "learner ranks": cluster.learner_ranks * learner.peak,
                "verifiers": self.config.rewards.verifiers * VERIFIER,
                "driver and Ray": OTHERS,
            }
            return [Seat("the machine", 1, {"all": whole})]
        sync = {"weights": learner.held["weights"], "sync bucket": bucket(self.config, self.shape)}
        awake = {name: rollout.held | parts for name, parts in rollout.phases.items()}
        learning = {name: learner.held | parts for name, parts in learner.phases.items()}
        if cluster.resolved_placement == "disaggregated":
            sampling = cluster.rollout_workers * self.config.rollout.tensor_parallel
            return [
                Seat("sampling GPU", sampling, awake),
                Seat("learning GPU", cluster.learner_ranks, learning | {"sync": learner.held | sync}),
            ]
        # Of rollout workers that sleep their process is left, of the learner also its weights and its reference.
        both = {"process": learner.held["process"] + rollout.held["process"]}
        both["weights"] = learner.held["weights"] + rollout.held["weights"]
        both |= {name: size for name, size in learner.held.items() if name == "reference"}
        phases = {"sampling": awake["sampling"] | both, "sync": both | {"sync bucket": sync["sync bucket"]}}
        phases |= {name: parts | {"process": both["process"]} for name, parts in learning.items()}
        return [Seat("shared GPU", self.gpus_asked, phases)]

    @property
    def host(self) -> Parts:
        """Bytes in the CPU's memory beside GPUs: what all learner ranks offload, and their copies for a checkpoint, of
        the weights on rank 0 alone."""
        ranks = self.config.cluster.learner_ranks
        parts = {n: size * (1 if n == "saved weights" else ranks) for n, size in self.learner.host.items()}
        if parts and self.config.cluster.resolved_placement == "colocated":
            asleep = ("fp32 masters", "optimizer")
            parts["learner asleep"] = ranks * sum(self.learner.held.get(name, 0.0) for name in asleep)
            parts["rollout workers asleep"] = self.config.cluster.rollout_workers * self.rollout.held["weights"]
        return parts

    @cached_property
    def problems(self) -> list[str]:
        """What does not fit, one sentence each."""
        config, device = self.config, self.hardware.device
        found = []
        if not device.is_cpu and self.gpus_asked > self.hardware.count:
            found.append(f"{_count(self.gpus_asked, 'GPU')} are asked for and {self.hardware.count} there")
        if config.model.dtype == "bfloat16" and device.bf16 is None:
            found.append(f"a {device.name} has no bfloat16")
        found += [
            f"{seat.name} needs {seat.peak / GIB:.1f} GiB of {self.usable / GIB:.1f}"
            for seat in self.seats
            if seat.peak > self.usable
        ]
        if not sequences_held(config, self.shape):
            least = sequence_kv_bytes(config, self.shape) / MIB
            found.append(f"one sequence of {config.max_tokens} tokens needs {least:.0f} MiB of KV cache")
        if config.rollout.tensor_parallel > 1 and self.shape.heads % config.rollout.tensor_parallel:
            found.append(f"{self.shape.heads} heads cannot be shared by {config.rollout.tensor_parallel} GPUs")
        return found

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def excess(self) -> float:
        """How far from fitting, to compare changes by: bytes over, and a whole device's for anything else."""
        over = [max(0.0, seat.peak - self.usable) for seat in self.seats]
        others = len(self.problems) - sum(1 for size in over if size)
        return sum(over) + others * self.hardware.device.memory * max(1, self.gpus_asked)

    @property
    def kv_cache_mb_possible(self) -> int:
        """The largest rollout.kv_cache_mb that fits, in steps of 256 MiB."""
        with_cache = [seat.peak for seat in self.seats[:1]]
        if not self.hardware.device.is_cpu:
            with_cache = [sum(p.values()) for seat in self.seats for p in seat.phases.values() if "KV cache" in p]
        workers = self.config.cluster.rollout_workers if self.hardware.device.is_cpu else 1
        free = (self.usable - max(with_cache)) / workers
        return int((self.config.rollout.kv_cache_mb + free / MIB) // KV_STEP_MB * KV_STEP_MB)

    def changed(self, changes: Changes) -> Plan | None:
        """The plan with these options changed; None where the schema refuses that."""
        tree = self.config.model_dump()
        for key, value in changes.items():
            section, name = key.split(".")
            tree[section][name] = value
        try:
            return Plan(Config.model_validate(tree), self.shape, self.hardware)
        except ValidationError:
            return None

    def cost(self, price: float, steps: int = 1000) -> float:
        """Dollars of so many steps, of all GPUs there are, busy or not."""
        return steps * self.times.step / 3600 * self.hardware.count * price

    # -- what to change ---------------------------------------------------------------------------

    def advice(self) -> Changes | None:
        """Options that make it fit, the fewest and gentlest found; empty if it fits, None if nothing helps."""
        for level in range(1, len(_LEVELS) + 1):
            changes: Changes = {}
            plan: Plan = self
            while plan.problems:
                better = plan._best_change(level)
                if better is None:
                    break
                changes |= better
                plan = self.changed(changes) or plan
            if not plan.problems:
                return self._needed(changes)
        return None

    def _best_change(self, level: int) -> Changes | None:
        """The first change that suffices, else the one that helps most."""
        best, least = None, self.excess
        for kind in _LEVELS[:level]:
            for changes in kind(self):
                plan = self.changed(changes)
                if plan is None:
                    continue
                if not plan.problems:
                    return changes
                if plan.excess < least:
                    best, least = changes, plan.excess
        return best

    def _needed(self, changes: Changes) -> Changes:
        for key in list(changes):
            without = {k: v for k, v in changes.items() if k != key}
            plan = self.changed(without)
            if plan is not None and not plan.problems:
                changes = without
        return changes

    # -- how to share out the GPUs ----------------------------------------------------------------

    def splits(self) -> list[Split]:
        """Every way to share out the GPUs between sampling and learning, the shortest step first."""
        found = []
        for changes in _layouts(self):
            plan = self.changed(changes)
            if plan is not None:
                found.append(Split(changes, plan.times, plan.fits))
        return sorted(found, key=lambda split: split.times.step)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


# -- changes, the gentlest first ------------------------------------------------------------------


def _halved(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _layouts(plan: Plan) -> Iterator[Changes]:
    """All GPUs shared by both sides, or some for each, on-policy or as stale as the config allows (or by one)."""
    if plan.hardware.device.is_cpu:
        return
    gpus, together = plan.hardware.count, plan.config.rollout.tensor_parallel
    keys = ("cluster.placement", "cluster.rollout_workers", "cluster.learner_ranks", "cluster.max_staleness")
    if gpus % together == 0:
        yield dict(zip(keys, ("colocated", gpus // together, gpus, 0), strict=True))
    stale = max(1, plan.config.cluster.resolved_max_staleness)
    for workers in range(1, gpus // together + 1):
        ranks = gpus - workers * together
        for staleness in (0, stale) if ranks else ():
            yield dict(zip(keys, ("disaggregated", workers, ranks, staleness), strict=True))


def _layout_as_stale(plan: Plan) -> Iterator[Changes]:
    if plan.gpus_asked > plan.hardware.count:
        stale = plan.config.cluster.resolved_max_staleness
        yield from (changes for changes in _layouts(plan) if changes["cluster.max_staleness"] == stale)
        yield from (changes for changes in _layouts(plan) if changes["cluster.max_staleness"] < stale)


def _same_result(plan: Plan) -> Iterator[Changes]:
    """What costs time and changes no result."""
    config, device = plan.config, plan.hardware.device
    if config.model.dtype == "bfloat16" and device.bf16 is None:
        yield {"model.dtype": "float32"}
    yield from _layout_as_stale(plan)
    least = -(-sequence_kv_bytes(config, plan.shape) // MIB)
    possible = plan.kv_cache_mb_possible
    if config.rollout.kv_cache_mb < least:
        yield {"rollout.kv_cache_mb": int(-(-4 * least // KV_STEP_MB) * KV_STEP_MB)}
        yield {"rollout.kv_cache_mb": int(least)}
    elif possible < config.rollout.kv_cache_mb:
        yield {"rollout.kv_cache_mb": max(possible, int(least))}
    if not config.model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    for tokens in _halved(config.learner.logprob_chunk_tokens, 64):
        yield {"learner.logprob_chunk_tokens": tokens}
    for tokens in _halved(config.learner.tokens_per_micro_batch, config.max_tokens):
        yield {"learner.tokens_per_micro_batch": tokens}
    if config.learner.tokens_per_micro_batch > config.max_tokens:
        yield {"learner.tokens_per_micro_batch": config.max_tokens}
    for running in _halved(config.rollout.max_running, 8):
        yield {"rollout.max_running": running}
    if config.cluster.learner_ranks > 1:
        for stage in range(config.learner.zero_stage + 1, 4):
            yield {"learner.zero_stage": stage}


def _other_optimizer(plan: Plan) -> Iterator[Changes]:
    if plan.config.learner.optimizer == "adamw" and not plan.hardware.device.is_cpu:
        yield {"learner.optimizer": "adamw_8bit"}
    if not plan.hardware.device.is_cpu:
        stage = plan.config.learner.zero_stage or 2
        yield {"learner.optimizer": "adamw_cpu", "learner.zero_stage": stage}


def _shared_model(plan: Plan) -> Iterator[Changes]:
    together = 2 * plan.config.rollout.tensor_parallel
    while plan.shape.heads % together == 0 and together <= plan.hardware.count and not plan.hardware.device.is_cpu:
        yield {"rollout.tensor_parallel": together}
        together *= 2


def _other_numbers(plan: Plan) -> Iterator[Changes]:
    if plan.config.model.dtype == "float32" and plan.hardware.device.bf16 is not None:
        yield {"model.dtype": "bfloat16", "rollout.logprob_diff": max(0.02, plan.config.rollout.logprob_diff)}


def _other_method(plan: Plan) -> Iterator[Changes]:
    if not plan.config.model.lora_rank:
        yield {"model.lora_rank": 16}


_LEVELS = (_same_result, _other_optimizer, _shared_model, _other_numbers, _other_method)
