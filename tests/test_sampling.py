"""Sampling and verifying side by side: early groups are judged while late ones generate, order restored."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import psutil
import pytest
import ray
from ray.actor import ActorHandle

from actors.allocator import JEMALLOC, Kind, allocator_environment
from actors.crew import Crew
from actors.engine import Sampling
from actors.rollout_pool import RolloutPool
from actors.rollout_worker import SampleRequest
from actors.sampling import sample_and_verify, stream_verified
from actors.verifier_pool import VerifierPool
from cluster.materials import Materials, prepare
from cluster.start import start_rollout, start_verifier
from configs.errors import RunError
from configs.loading import load_config
from configs.schema import Config
from data.records import Group, Prompt
from tests.small_run import SMALL, arguments

REQUEST = SampleRequest(4, Sampling(1.0, 32), seed=3)


def alone(actor: ActorHandle, seconds: float = 60.0) -> Crew:
    """A crew of one that nobody replaces."""
    return Crew("actor", [actor], seconds)


class TimedVerifiers(VerifierPool):
    """A verifier pool that notes when each group was sent to be scored."""

    def __init__(self, crew: Crew) -> None:
        super().__init__(crew)
        self.sent: list[tuple[float, int]] = []

    def score(self, group: Group) -> tuple[ray.ObjectRef, int]:
        self.sent.append((time.monotonic(), group.prompt.visit))
        return super().score(group)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    # Four completions at a time: the groups cannot all run together, so some finish long before others.
    place = arguments(tmp_path_factory.mktemp("sampling"), "x", "rollout.max_running=4")
    return load_config(SMALL, place[2:])


@pytest.fixture(scope="module")
def materials(config: Config) -> Materials:
    return prepare(config, lambda _: None)


@pytest.fixture(scope="module")
def actors(config: Config, materials: Materials, ray_cluster: None) -> Iterator[tuple[ActorHandle, ActorHandle]]:
    """One rollout worker and one verifier."""
    where = {"num_cpus": 0.2}
    worker, verifier = start_rollout(config, where, materials.model_path, 0), start_verifier(config, where)
    ray.get([worker.ready.remote(), verifier.ready.remote()], timeout=120)
    yield worker, verifier
    ray.get(verifier.close.remote(), timeout=20)
    for actor in (worker, verifier):
        ray.kill(actor)


def test_a_worker_allocates_with_jemalloc_after_what_its_user_preloads(
    actors: tuple[ActorHandle, ActorHandle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heap of glibc has holes after hours, and grows when a step's tensors fit none of them."""
    worker, verifier = actors
    assert str(JEMALLOC.resolve()) in libraries(worker)
    assert str(JEMALLOC.resolve()) not in libraries(verifier)
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    for kind in get_args(Kind):
        assert allocator_environment(kind)["LD_PRELOAD"] == f"libtcmalloc.so:{JEMALLOC}"


def libraries(actor: ActorHandle) -> set[str]:
    """The files that its process has mapped."""
    process = psutil.Process(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=20))
    return {mapped.path for mapped in process.memory_maps()}


def test_groups_are_verified_while_others_generate_and_come_back_in_visit_order(
    actors: tuple[ActorHandle, ActorHandle], materials: Materials
) -> None:
    worker, verifier = actors
    verifiers = TimedVerifiers(alone(verifier))
    started = time.monotonic()
    prompts = materials.train[:12][::-1]
    sampled = sample_and_verify(RolloutPool(alone(worker)), verifiers, prompts, REQUEST, 60.0)
    first_sent, last_sampled = verifiers.sent[0][0] - started, sampled.sample_seconds
    assert first_sent < 0.5 * last_sampled, "the first group must be judged long before the last is sampled"
    assert [group.prompt.visit for group in sampled.groups] == list(range(12))
    assert [visit for _, visit in verifiers.sent] != list(range(12))
    assert all(len(group.verdicts) == len(group.completions) == 4 for group in sampled.groups)


def test_the_same_visits_give_the_same_completions_again(
    actors: tuple[ActorHandle, ActorHandle], materials: Materials
) -> None:
    worker, verifier = actors
    texts = []
    for prompts in (materials.train[:6], materials.train[3:6]):
        pools = RolloutPool(alone(worker)), VerifierPool(alone(verifier))
        groups = sample_and_verify(*pools, prompts, REQUEST, 60.0).groups
        texts.append({group.prompt.visit: [completion.text for completion in group.completions] for group in groups})
    assert all(texts[1][visit] == texts[0][visit] for visit in (3, 4, 5))


def test_prompts_that_are_too_many_for_one_step_and_for_the_cache_give_the_same_completions(
    materials: Materials, ray_cluster: None, tmp_path: Path
) -> None:
    """vLLM reads them in several steps, and puts some off whose completions it has begun."""
    config = load_config(SMALL, [*arguments(tmp_path, "x")[2:], "rollout.kv_cache_mb=10"])
    tokens = [token for prompt in materials.train for token in prompt.token_ids]
    length = config.data.max_prompt_tokens - 1  # 8,192 is no multiple of it
    prompts = [
        replace(materials.train[0], visit=visit, token_ids=tuple(tokens[visit : visit + length]))
        for visit in range(9000 // length)
    ]
    worker = start_rollout(config, {"num_cpus": 0.2}, materials.model_path, 0)
    try:
        together = token_ids(worker, prompts)
        apart = [token_ids(worker, prompts[start : start + 24]) for start in range(0, len(prompts), 24)]
    finally:
        ray.kill(worker)
    assert together == {visit: tokens for part in apart for visit, tokens in part.items()}
    assert len(together) == len(prompts)


def token_ids(worker: ActorHandle, prompts: Sequence[Prompt]) -> dict[int, list[int]]:
    """By visit, of one completion of each prompt."""
    ray.get(worker.submit.remote(prompts, replace(REQUEST, completions=1)), timeout=60)
    found: dict[int, list[int]] = {}
    until = time.monotonic() + 60
    while len(found) < len(prompts) and time.monotonic() < until:
        for group in ray.get(worker.take.remote(5.0), timeout=20):
            found[group.prompt.visit] = group.completions[0].token_ids.tolist()
    return found


class CountingRollouts(RolloutPool):
    """A rollout pool that notes how many prompts are under way after each submission."""

    def submit(self, prompts: Sequence[Prompt], request: SampleRequest) -> None:
        super().submit(prompts, request)
        self.most = max(getattr(self, "most", 0), *(len(owed) for owed in self._owed.values()))


def test_a_stream_asks_for_so_many_prompts_at_a_time_and_samples_the_same(
    actors: tuple[ActorHandle, ActorHandle], materials: Materials
) -> None:
    worker, verifier = actors
    prompts, rollouts = materials.train[:12], CountingRollouts(alone(worker))
    stream = stream_verified(rollouts, VerifierPool(alone(verifier)), prompts, REQUEST, 60.0, under_way=3)
    streamed = sorted((group for groups in stream for group in groups), key=lambda group: group.prompt.visit)
    assert rollouts.most == 3
    at_once = sample_and_verify(
        RolloutPool(alone(worker)), VerifierPool(alone(verifier)), prompts, REQUEST, 60.0
    ).groups
    texts = [[[completion.text for completion in group.completions] for group in each] for each in (streamed, at_once)]
    assert texts[0] == texts[1]
    assert [group.verdicts for group in streamed] == [group.verdicts for group in at_once]


def test_a_frozen_worker_is_named_when_the_deadline_passes(
    actors: tuple[ActorHandle, ActorHandle], materials: Materials
) -> None:
    worker, verifier = actors
    process = ray.get(worker.ready.remote(), timeout=20)
    pools = RolloutPool(alone(worker, 2.0)), VerifierPool(alone(verifier))
    os.kill(process, signal.SIGSTOP)
    try:
        with pytest.raises(RunError, match=r"rollout worker .*did not answer within 2 s.*cluster\.deadline_seconds"):
            sample_and_verify(*pools, materials.train[:2], REQUEST, 2.0)
    finally:
        os.kill(process, signal.SIGCONT)


def test_a_worker_that_dies_is_named(
    actors: tuple[ActorHandle, ActorHandle], config: Config, materials: Materials, tmp_path: Path
) -> None:
    """Last: it takes the worker with it."""
    worker, verifier = actors
    process = ray.get(worker.ready.remote(), timeout=20)
    pool = RolloutPool(alone(worker, 20.0))
    os.kill(process, signal.SIGKILL)
    with pytest.raises(RunError, match=r"rollout worker .*has died"):
        sample_and_verify(pool, VerifierPool(alone(verifier)), materials.train[:2], REQUEST, 20.0)
