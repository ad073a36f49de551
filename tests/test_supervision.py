"""Supervision by itself: who is found, who is replaced, what is sent out again, and when it ends. Actors are tiny."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.actor import ActorHandle

from actors.crew import Crew
from actors.engine import Sampling
from actors.restarts import Restarts
from actors.rollout_pool import RolloutPool
from actors.rollout_worker import SampleRequest
from actors.sampling import sample_and_verify
from actors.verifier import Verifier
from actors.verifier_pool import VerifierPool
from actors.waiting import ActorLost, ask, wait_for
from benchmarks.prey import await_
from cluster.account import Account
from cluster.checkpoints import LoopState
from cluster.heartbeats import Heartbeats, watched
from cluster.learner_group import LearnerGroup, LearnerLost
from configs.errors import RunError
from configs.schema import Rewards
from data.records import Problem, Prompt
from tests.processes import gone
from tests.small_run import ROOT
from tests.tiny_actors import Collective, Tiny

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("ray_cluster")]
REQUEST = SampleRequest(1, Sampling(1.0, 4), 0)
MOST = 3


def tiny(*arguments: Any) -> ActorHandle:
    return watched(Tiny).options(num_cpus=0).remote(*arguments)


def crew(size: int, said: list[str], *arguments: Any) -> Crew:
    def start(place: int) -> ActorHandle:
        return tiny(*arguments)

    actors = [start(place) for place in range(size)]
    ray.get([actor.ready.remote() for actor in actors], timeout=60)
    return Crew("tiny actor", actors, 30.0, start, Restarts(said.append, MOST, pause_seconds=0.01))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(visit, Problem(str(visit), "", "7"), (1,)) for visit in range(count)]


def end(*crews: Crew) -> None:
    for each in crews:
        for actor in each.actors:
            ray.kill(actor)


def test_what_lost_workers_and_verifiers_had_is_done_by_others_once(tmp_path: Path) -> None:
    said: list[str] = []
    folders = [tmp_path / name for name in ("worker", "verifier")]
    for folder in folders:
        folder.mkdir()
    workers, verifiers = crew(2, said, (3, 7), folders[0]), crew(1, said, (5,), folders[1])
    pools = RolloutPool(workers), VerifierPool(verifiers)
    renewed: list[int] = []

    def renew() -> dict[str, float]:
        renewed.append(1)
        return {}

    pools[0].renew = renew
    groups = sample_and_verify(*pools, prompts(12), REQUEST, 60.0).groups
    assert [group.prompt.visit for group in groups] == list(range(12))
    assert len(renewed) == 2, "every worker that was replaced got the weights"
    assert sum("Tiny actor" in line and "was lost and is started again" in line for line in said) == 3
    end(workers, verifiers)


def test_what_dies_of_the_same_prompt_again_and_again_ends_the_run() -> None:
    said: list[str] = []
    workers, verifiers = crew(1, said, (2,)), crew(1, said)
    with pytest.raises(RunError, match=rf"Tiny actor 0 was lost again, after {MOST} restarts without a step"):
        sample_and_verify(RolloutPool(workers), VerifierPool(verifiers), prompts(4), REQUEST, 60.0)
    assert len(said) == MOST
    end(workers, verifiers)


def test_a_reward_that_sleeps_for_ever_is_a_named_error_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_reward.py").write_text("import time\ndef sleeps(case, judgement):\n    time.sleep(1e6)\n")
    monkeypatch.syspath_prepend(tmp_path)
    verifier = watched(Verifier).options(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{tmp_path}"}})
    kind = [verifier.remote(Rewards(weights={"slow_reward:sleeps": 1.0}), 32)]
    ray.get([each.ready.remote() for each in kind], timeout=60)
    workers, verifiers = crew(1, []), Crew("verifier", kind, 30.0)
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"A verifier \(scoring\) did not answer within 3 s.*cluster.deadline_seconds"):
        sample_and_verify(RolloutPool(workers), VerifierPool(verifiers), prompts(2), REQUEST, 3.0)
    assert time.monotonic() - begun < 5.0
    end(workers, verifiers)


def test_a_step_further_than_any_before_makes_room_for_restarts() -> None:
    restarts = Restarts(lambda line: None, most=1, pause_seconds=0.0)
    restarts.allow("it", "why")
    restarts.progress(1)
    restarts.allow("it", "why")
    restarts.progress(1)  # gone back, and no further than before
    with pytest.raises(RunError, match="without a step in between: why"):
        restarts.allow("it", "why")


def test_a_push_that_breaks_off_replaces_every_worker_and_pushes_again() -> None:
    workers = crew(2, [])
    pool, before = RolloutPool(workers), list(workers.actors)
    pool.renew = lambda: {"seconds": 1.0}

    def breaks() -> dict[str, float]:
        raise ActorLost("half way")

    assert pool.push(breaks) == {"seconds": 1.0}
    assert not set(before) & set(pool.workers)
    end(workers)


def test_who_freezes_is_gone_within_two_heartbeats_and_a_busy_actor_is_not() -> None:
    """The second freezes when it has answered, while the first is waited for."""
    beat, said = 5.0, list[str]()
    first, busy, second = tiny(), tiny(), tiny()
    pids = ray.get([first.ready.remote(), second.ready.remote()], timeout=60)
    ends_busy = busy.sleep.remote(3 * beat)
    frozen = list(map(psutil.Process, pids))
    os.kill(pids[0], signal.SIGSTOP)
    begun = [time.monotonic()]
    heartbeats = Heartbeats(beat, {"tiny actor": lambda: [first, busy, second]}, said.append)
    time.sleep(1.1 * beat)
    os.kill(pids[1], signal.SIGSTOP)
    begun.append(time.monotonic())
    for process, since in zip(frozen, begun, strict=True):
        await_(partial(gone, process), "a frozen actor's end")
        assert time.monotonic() - since < 2 * beat
    with pytest.raises(ActorLost):
        wait_for([ask(first.ready)], 20.0, "it", "option")
    ray.get(ends_busy, timeout=20)
    heartbeats.close()
    assert said[0] == "Tiny actor 0 has not answered for 4 s: killed"
    assert not any("Tiny actor 1" in line for line in said)
    ray.kill(busy)


def test_a_rank_that_fails_because_another_died_is_a_lost_learner() -> None:
    other = tiny()
    pid = ray.get(other.ready.remote(), timeout=60)
    rank = watched(Collective).options(num_cpus=0).remote()
    group = LearnerGroup([rank], 30.0)
    group.ranks.append(other)
    answer = rank.update.remote([other])
    time.sleep(1.0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(LearnerLost, match=r"learner rank .*has died"):
        group._wait([answer], "A learner rank (update)")
    ray.kill(rank)


def test_nobody_is_replaced_for_a_learner_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that may be frozen is not waited for: its heartbeats find it."""
    monkeypatch.setattr("cluster.learner_group.ALIVE_SECONDS", 0.5)
    rank, said = tiny(), list[str]()
    workers, verifiers = crew(1, said, (2, 5), tmp_path), crew(1, said)
    workers.check_needed = LearnerGroup([rank], 30.0).check_alive
    learner = psutil.Process(ray.get(rank.ready.remote(), timeout=60))
    learner.suspend()
    pools = RolloutPool(workers), VerifierPool(verifiers)
    sample_and_verify(*pools, prompts(4), REQUEST, 60.0)
    assert len(said) == 1
    learner.kill()
    with pytest.raises(LearnerLost, match="has died"):
        sample_and_verify(*pools, prompts(8), REQUEST, 60.0)
    assert len(said) == 1
    end(workers, verifiers)


@pytest.mark.parametrize("fault", ["lost", "twice"])
def test_a_group_that_is_lost_or_trained_on_twice_stops_the_run(fault: str) -> None:
    account = Account()
    account.note(trained=8, flat=2)
    account.check(handed_out=16, in_flight=6)
    account.note(trained=1 if fault == "twice" else 0)
    with pytest.raises(RunError, match="does not balance: 16 were handed out"):
        account.check(handed_out=16, in_flight=6 if fault == "twice" else 5)


def test_going_back_counts_what_is_handed_out_again() -> None:
    account = Account(trained=8)
    account.check(12, in_flight=4)
    account.rewind(LoopState(1, 4, 1, 1, 0, trained=4))
    assert (account.trained, account.rewound) == (4, 8)
    account.check(4, in_flight=0)
