"""A rollout worker and a learner rank as a run has them, connected, for parts that need no whole run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from actors.crew import OPTION
from actors.waiting import Deadline, wait_for
from benchmarks.gpu_stages.part import Setting
from benchmarks.weight_sync import start
from cluster.loop import sample_request
from cluster.ray_session import ray_session
from cluster.start import Actors
from cluster.turns import Turns
from configs.loading import load_config
from configs.schema import Config
from data.records import Group, Problem, Prompt
from learner.push_check import difference, probe_sequences


@dataclass
class Rig:
    """Samples, learns and pushes by the calls that a run makes, in any order."""

    config: Config
    actors: Actors
    turns: Turns
    version: int = 0

    def sample(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Their groups, unverified, by the weights that the worker has. RunError after cluster.deadline_seconds."""
        self.turns.sampling()
        rollouts, deadline = self.actors.rollouts, Deadline(self.config.cluster.deadline_seconds)
        rollouts.submit(prompts, sample_request(self.config))
        groups: list[Group] = []
        while len(groups) < len(prompts):
            for reference, worker in rollouts.take().items():
                (found,) = wait_for([reference], deadline.left, "A rollout worker (take)", OPTION)
                groups += rollouts.delivered(worker, found)
        return groups

    def difference(self, groups: Sequence[Group]) -> tuple[float, float]:
        """(mean, largest) |sampler's - learner's| log-prob of every sampled token, by the learner's weights now."""
        self.turns.learning()
        sampled_by = int(groups[0].completions[0].versions[0])
        return difference(self.actors.learner.with_old_logprobs(probe_sequences(groups, sampled_by)))

    def learn(self, groups: Sequence[Group]) -> None:
        """One optimizer step, for every second completion and against the others."""
        self.turns.learning()
        sequences = probe_sequences(groups, self.version)
        signed = [replace(s, advantage=1.0 if place % 2 else -1.0) for place, s in enumerate(sequences)]
        self.actors.learner.update(signed, False)
        self.version += 1

    def push(self) -> dict[str, float]:
        """The learner's weights to the worker; seconds of the parts of it."""
        self.turns.pushing()
        return self.actors.learner.sync_weights()


@contextmanager
def rig(setting: Setting, model: Path, *options: str) -> Iterator[Rig]:
    """Started on a Ray of its own, and ended. options: `section.key=value`, over `OPTIONS`."""
    config = load_config(None, [f"model.name={model}", *OPTIONS, *setting.size((), TINY), *options])
    with ray_session("auto"):
        actors = start(config, model)
        try:
            shared = actors.device == "cuda" and config.cluster.resolved_placement == "colocated"
            yield Rig(config, actors, Turns(actors.rollouts, actors.learner, shared))
        finally:
            actors.stop()


OPTIONS = (
    "model.dtype=bfloat16",
    "rollout.kv_cache_mb=4096",
    "learner.optimizer=adamw_8bit",
    "learner.zero_stage=0",
    "learner.tokens_per_micro_batch=16384",
    "cluster.deadline_seconds=200",
)
TINY = ("rollout.kv_cache_mb=32", "learner.threads=1")


def random_prompts(count: int, length: int, vocabulary: int) -> list[Prompt]:
    """Prompts of random tokens, none of them special."""
    random = np.random.default_rng(0)
    ids = random.integers(8, vocabulary, (count, length))
    return [Prompt(visit, Problem(str(visit), "", ""), tuple(row.tolist())) for visit, row in enumerate(ids)]
