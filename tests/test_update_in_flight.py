"""Weights change while a rollout worker samples: none are decoded with by halves, and every token has its version."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.rollout_worker
from actors.engine import Engine, Sampling
from actors.rollout_worker import HalfLoaded, RolloutWorker, SampleRequest
from cluster.weight_sender_cpu import SharedMemorySender
from data.records import Completion, Group, Problem, Prompt
from tests.test_weight_sync import (
    BUCKET_BYTES,
    PROMPT,
    TEMPERED,
    Given,
    Rig,
    difference,
    engine_options,
    healthy,
    make_model,
    stops_the_run,
)

LONG = SampleRequest(4, Sampling(temperature=0.8, max_completion_tokens=100), seed=1)
SHORT = SampleRequest(4, Sampling(temperature=0.8, max_completion_tokens=12), seed=2)
DEADLINE_SECONDS = 60.0


class Updates:
    """A worker in this process, and a sender to it. events: what the worker's thread did, in order."""

    def __init__(self, models: list[Path], deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.policies = [Rig.load(path) for path in models]
        self.worker = RolloutWorker(engine_options(models[0]), deadline_seconds)
        self.given = Given(dict(self.policies[0].named_weights()))
        self.sender = SharedMemorySender(self.call, BUCKET_BYTES)
        self.events: list[str] = []
        self.pause_seconds = 0.0
        self.version = 0
        self._visits = 0
        self.worker.ready()
        self.sender.open(self.given)

    def call(self, method: str, arguments: Any) -> list[Any]:
        answer = self.worker.weight_transfer(method, arguments)
        time.sleep(self.pause_seconds)  # for the worker to do what it must not
        return [answer]

    def send(self) -> None:
        """The weights of the next version: even ones are the first model's, odd ones the second's."""
        self.version += 1
        self.given.tensors = dict(self.policies[self.version % 2].named_weights())
        self.sender.send(self.version)

    def submit(self, request: SampleRequest) -> None:
        prompt = Prompt(self._visits, Problem(str(self._visits), "", ""), tuple(PROMPT))
        self._visits += 1
        self.worker.submit([prompt], request)

    def take(self, groups: int) -> list[Completion]:
        found: list[Group] = []
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(found) < groups:
            assert time.monotonic() < deadline, "the worker hands out no groups"
            found += self.worker.take(1.0)
        return [completion for group in found for completion in group.completions]

    def steps_within_updates(self) -> int:
        """How often the worker decoded between a start and its finish."""
        within, count = False, 0
        for event in self.events:
            within = (within or event == "start_weight_update") and event != "finish_weight_update"
            count += within and event == "step"
        return count


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make_model(folder / str(seed), tied=False, seed=seed) for seed in range(2)]


@pytest.fixture
def updates(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> Updates:
    made = Updates(models)
    step, transfer = Engine.step, Engine.weight_transfer

    def noted_step(engine: Engine) -> list[tuple[str, Completion]]:
        made.events.append("step")
        return step(engine)

    def noted_transfer(engine: Engine, call: str, **arguments: Any) -> None:
        transfer(engine, call, **arguments)
        made.events.append(call)

    monkeypatch.setattr(Engine, "step", noted_step)
    monkeypatch.setattr(Engine, "weight_transfer", noted_transfer)
    return made


def test_tokens_have_the_version_and_the_log_probs_of_the_weights_that_sampled_them(updates: Updates) -> None:
    updates.pause_seconds = 0.005
    fresh: list[Completion] = []
    running: list[Completion] = []
    for _ in range(3):
        before = updates.version
        updates.submit(LONG)
        time.sleep(0.05)
        updates.send()
        updates.submit(SHORT)  # starts with the new weights, while the long ones go on
        done = updates.take(2)
        new = [c for c in done if len(c.token_ids) <= 12 and c.versions[0] == updates.version]
        fresh += new
        old = [c for c in done if c.versions[0] == before]
        running += old
        policy, other = updates.policies[updates.version % 2], updates.policies[before % 2]
        assert len(new) == 4 and {int(v) for c in new for v in c.versions} == {updates.version}
        assert healthy(difference(policy, PROMPT, new, TEMPERED))
        assert stops_the_run(difference(other, PROMPT, new, TEMPERED))
        first_part = [_until(c, before) for c in old]
        assert healthy(difference(other, PROMPT, first_part, TEMPERED))
    changed = [c for c in running if len(set(c.versions.tolist())) > 1]
    assert changed, "no completion was under way when weights changed, so this test proves nothing"
    assert all(a <= b for c in running for a, b in pairwise(c.versions.tolist()))
    assert updates.steps_within_updates() == 0


def _until(completion: Completion, version: int) -> Completion:
    """The tokens that this version sampled."""
    count = int(np.count_nonzero(completion.versions == version))
    return replace(completion, token_ids=completion.token_ids[:count], logprobs=completion.logprobs[:count])


def test_decoding_within_an_update_would_show(updates: Updates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the worker takes the start of an update for any other call, and decodes with old and new."""
    monkeypatch.setattr(actors.rollout_worker, "START", "a call that is never made")
    updates.pause_seconds = 0.05
    updates.submit(LONG)
    updates.send()
    sampled = [_until(completion, 0) for completion in updates.take(1)]
    assert updates.steps_within_updates() > 0
    assert stops_the_run(difference(updates.policies[0], PROMPT, sampled, TEMPERED))


def test_a_sender_that_dies_within_an_update_stops_the_worker(models: list[Path]) -> None:
    updates = Updates(models, deadline_seconds=0.5)
    updates.submit(LONG)
    updates.call("start_weight_update", {})
    with pytest.raises(HalfLoaded, match=r"0\.5 s after its last call has not gone on"):
        updates.take(1)
    with pytest.raises(HalfLoaded):
        updates.submit(SHORT)


def test_an_update_that_fails_half_way_ends_the_worker(models: list[Path]) -> None:
    updates = Updates(models)
    missing = "model.layers.1.mlp.up_proj.weight"
    updates.given.tamper = lambda tensors: [(n, t) for n, t in tensors if n != missing]
    with pytest.raises(HalfLoaded, match=rf"lacked 1 parameters: {missing}"):
        updates.send()
    with pytest.raises(HalfLoaded):
        updates.take(1)
