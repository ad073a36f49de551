"""What does not shrink with more GPUs: seconds of the driver's own thread, and of what every rank does for itself.

Measured as CPU seconds of the thread on the real code, so that waiting does not enter and a busy machine hardly does:
a group's way through `Flight` and the pools (over Ray, between actors that hand out ready groups), a step's records,
the cutting of an update batch, a call of every rollout worker. What only a verifier does is measured by the clock.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import ray

from actors.crew import Crew
from actors.engine import Sampling
from actors.rollout_pool import RolloutPool, WorkerCalls
from actors.rollout_worker import SampleRequest
from actors.sampling import Flight, Sampled
from actors.verifier import Verifier
from actors.verifier_pool import VerifierPool
from actors.waiting import Deadline
from benchmarks.simulator.least_squares import least_squares
from benchmarks.simulator.lengths import LogNormal
from cluster.metrics import group_metrics, staleness_metrics
from cluster.ray_session import ray_session
from configs.schema import Learner, Rewards
from data.records import Completion, Group, Problem, Prompt, Verdict
from data.rollouts import write_groups
from learner.batching import plan_rows
from learner.from_groups import sequences_of

SIZE = 8  # completions of a group
BUDGET = 16384  # tokens of a micro-batch
PENDING_SECONDS = 0.05  # for which a player lets its listeners wait, so that all of them are waited for at once
REQUEST = SampleRequest(SIZE, Sampling(1.0, 32), 0)
REPEATS = 3


def thread_seconds(work: Callable[[], object]) -> float:
    """The least CPU seconds of this thread in a few goes."""
    taken = []
    for _ in range(REPEATS):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return min(taken)


def made_group(visit: int, tokens: int) -> Group:
    """A group with its verdicts whose completions have so many tokens each, about 4 letters a token."""
    ids, floats = np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32)
    text = "four" * tokens
    completions = [Completion(i, i, ids, floats, np.zeros_like(ids), text, "stop") for i in range(SIZE)]
    verdicts = [Verdict({"accuracy": float(i % 2)}, float(i % 2), "correct", None) for i in range(SIZE)]
    return Group(made_prompt(visit), tuple(completions), tuple(verdicts))


def made_prompt(visit: int) -> Prompt:
    return Prompt(visit, Problem(str(visit), "?", "1"), tuple(range(32)))


class Player:
    """An actor at the other end of both pools: hands out ready groups as a worker, hands them back as a verifier."""

    def __init__(self, tokens: int) -> None:
        self._group = made_group(0, tokens)

    async def submit(self, prompts: list[Prompt], request: SampleRequest) -> None:
        """Nothing to do."""

    async def take(self, wait_seconds: float) -> list[Group]:
        await asyncio.sleep(PENDING_SECONDS)
        return [self._group]

    async def score(self, group: Group) -> Group:
        return group

    async def weight_transfer(self, call: str, arguments: dict[str, Any]) -> None:
        """Nothing to do."""


def hand_rates() -> dict[str, float]:
    """The driver's seconds of a group: in all, for each worker listened to, for each token; and of a worker's call."""
    rows, taken = [], []
    for actors, tokens in ((1, 16), (1, 16), (8, 16), (16, 16), (1, 2048), (1, 8192)):
        players = [ray.remote(Player).options(num_cpus=0).remote(tokens) for _ in range(actors)]
        groups = max(60, 3 * actors)
        flown = thread_seconds(partial(fly, players, groups))
        rows.append([1.0, float(actors), float(SIZE * tokens)])
        taken.append(flown / groups)
        for player in players:
            ray.kill(player)
    hand, actor, token = least_squares(rows, taken)
    return {"hand": hand, "hand_actor": actor, "hand_token": token, "call": call_seconds()}


def fly(players: list[Any], groups: int) -> None:
    """So many groups from these workers to a verifier and back."""
    rollouts, verifiers = (Crew("player", each, 60.0) for each in (players, players[:1]))
    flight = Flight(RolloutPool(rollouts), VerifierPool(verifiers), REQUEST)
    flight.submit([made_prompt(visit) for visit in range(groups)])
    deadline = Deadline(300.0)
    while flight.under_way:
        flight.wait(deadline)


def call_seconds(actors: int = 64) -> float:
    """Of a call of each rollout worker, as the weight transport makes for every bucket."""
    player = ray.remote(Player).remote(1)
    calls = WorkerCalls([player] * actors, 60.0)
    return thread_seconds(lambda: calls.weight_transfer("update_weights", {})) / actors


def record_rates() -> dict[str, float]:
    """The driver's seconds of what it writes and computes of a step: for each completion, for each token."""
    rows, taken = [], []
    for prompts, tokens in ((32, 16), (128, 16), (16, 512), (8, 4096)):
        groups = [made_group(visit, tokens) for visit in range(prompts)]
        rows.append([float(prompts * SIZE), float(prompts * SIZE * tokens)])
        taken.append(thread_seconds(partial(recorded, groups)))
    return dict(zip(("record", "record_token"), least_squares(rows, taken), strict=True))


def recorded(groups: list[Group]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_groups(Path(folder) / "step.parquet", groups)
    group_metrics(groups)
    staleness_metrics(Sampled(groups, 0.0, 0.0), 0)
    sequences_of(groups, Learner())


def share_rates() -> dict[str, float]:
    """A rank's seconds of cutting a whole update batch into micro-batches: for each completion, for their square."""
    rows, taken = [], []
    for count in (512, 2048, 8192):
        lengths = LogNormal(1500, 0.7, 8192).draw(Random(0), count)
        rows.append([float(count), float(count) ** 2])
        taken.append(thread_seconds(partial(plan_rows, lengths, BUDGET, packing=True)))
    return dict(zip(("share", "share_square"), least_squares(rows, taken), strict=True))


def verify_rates(groups: Sequence[Group]) -> dict[str, float]:
    """A verifier's wall-clock seconds of a group and of each completion in it, its child process included."""
    verifier = Verifier(Rewards(), 32)
    verifier.ready()
    rows, taken = [], []
    try:
        for size in (1, 4, SIZE):
            parts = [Group(group.prompt, group.completions[:size]) for group in groups]
            began = time.perf_counter()
            for part in parts:
                verifier.score(part)
            rows.append([1.0, float(size)])
            taken.append((time.perf_counter() - began) / len(parts))
    finally:
        verifier.close()
    return dict(zip(("verify_group", "verify"), least_squares(rows, taken), strict=True))


def serial_rates() -> dict[str, float]:
    """All that needs no run: see the functions above."""
    with ray_session("auto"):
        return {**hand_rates(), **record_rates(), **share_rates()}
