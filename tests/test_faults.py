"""Whoever dies or freezes, the run ends with the same weights, bit for bit, as the run that was left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import pytest
from ray.cluster_utils import Cluster

from benchmarks.made_cluster import add, made_cluster, raylet
from benchmarks.prey import LEARNER, VERIFIER, WORKER, actors, await_, slowed, steps_done, strike
from cluster.checkpoints import Checkpoints
from cluster.heartbeats import PATIENCE
from tests.conftest import SHARED_MEMORY
from tests.processes import title
from tests.small_run import ROOT, arguments, metrics, start, status

pytestmark = pytest.mark.faults

STEPS, BEAT = 8, 2.0
SETTINGS = (
    f"training.steps={STEPS}",
    "rollout.prompts_per_batch=8",
    "rollout.completions_per_prompt=8",
    f"cluster.heartbeat_seconds={BEAT}",
    "evaluation.every=0",
    "telemetry.live=off",
    "telemetry.tensorboard=false",
)


def begun(folder: Path, name: str, *more: str) -> subprocess.Popen[str]:
    return start(*arguments(folder, name, *SETTINGS, *more))


def ended(run: subprocess.Popen[str]) -> str:
    """What a run that went well said."""
    output, _ = run.communicate(timeout=250)
    assert run.returncode == 0, output
    return output


def weights(folder: Path) -> bytes:
    """The model after the last step."""
    newest = Checkpoints(folder / "checkpoints", keep=1).newest()
    assert newest is not None and newest.name == f"step_{STEPS:06d}"
    return (newest / "model.safetensors").read_bytes()


PATIENT = "cluster.heartbeat_seconds=30"  # of runs beside each other, each of which takes its time


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run, begun, and its folder."""
    folder = tmp_path_factory.mktemp("faults")
    with begun(folder, "undisturbed", PATIENT) as run, ending(run):
        yield run, folder / "undisturbed"


@pytest.fixture(scope="module")
def undisturbed(left_alone: tuple[subprocess.Popen[str], Path]) -> Path:
    run, folder = left_alone
    ended(run)
    return folder


FULL_DISK = """
import resource, sys
import cluster.attempt
from cluster.train import main

step = cluster.attempt.train_step

def and_then_the_disk_is_full(*arguments):
    answer = step(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return answer

cluster.attempt.train_step = and_then_the_disk_is_full
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run, begun, and its folder. After the first step the system lets no file of the driver's grow, its status.json
    neither."""
    folder = tmp_path_factory.mktemp("full")
    settings = (*SETTINGS, PATIENT, "telemetry.tensorboard=true")
    command = [sys.executable, "-c", FULL_DISK, *arguments(folder, "full", *settings)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as run, ending(run):
        yield run, folder / "full"


@contextmanager
def ending(run: subprocess.Popen[str]) -> Iterator[None]:
    """After this the run is over, if nobody has waited for that."""
    try:
        yield
    finally:
        if run.poll() is None:
            run.terminate()


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, undisturbed: Path) -> None:
    assert metrics(folder) == metrics(undisturbed)
    assert weights(folder) == weights(undisturbed)


@pytest.mark.usefixtures("left_alone")  # beside it
def test_a_disk_that_is_full_for_the_driver_ends_the_run_by_name(
    full_disk: tuple[subprocess.Popen[str], Path],
) -> None:
    run, folder = full_disk
    output, errors = run.communicate(timeout=250)
    *_, last = errors.splitlines()  # Ray's log and TensorBoard's thread may say so before
    assert run.returncode == 1, errors
    assert re.match(r"error: .* could not be written: .*File too large\. Make room on its disk", last), errors
    assert "the run failed" in output
    assert status(folder)["state"] in ("starting", "running"), "the last that could be written"


@pytest.mark.timeout(600)
def test_everyone_who_can_die_or_freeze_does_once_and_nothing_changes(undisturbed: Path, tmp_path: Path) -> None:
    run, folder = begun(tmp_path, "struck"), tmp_path / "struck"
    for after_step, number in ((1, signal.SIGKILL), (3, signal.SIGSTOP)):
        for who in (WORKER, VERIFIER):
            strike(run, folder, who, number, after_step)
    await_(lambda: steps_done(folder) >= 5, "step 5", run)
    (verifier,) = actors(run.pid, VERIFIER)
    for child in verifier.children(recursive=True):
        child.kill()
    await_(lambda: steps_done(folder) >= 6, "step 6", run)
    run.kill()
    output, _ = run.communicate(timeout=60)
    for who in ("Rollout worker 0", "Verifier 0"):
        assert output.count(f"{who} was lost and is started again") == 2
        assert output.count(f"{who} has not answered for {PATIENCE * BEAT:g} s: killed") == 1
    assert (status(folder)["state"], status(folder)["restarts"]) == ("running", 4)
    run = start("--resume", str(folder))
    strike(run, folder, LEARNER, signal.SIGKILL, after_step=7)
    for worker in actors(run.pid, WORKER):  # which then is in vain to replace
        worker.kill()
    output = ended(run)
    assert "The learner was lost and is started again (1 of at most 5 in a row)" in output
    assert "everything goes back to step_000006" in output
    assert_same(folder, undisturbed)
    found = status(folder)
    assert found["restarts"] == 1
    assert found["prompts"]["trained"] == 8 * STEPS and found["prompts"]["rewound"] >= 8


@pytest.mark.long
def test_one_of_two_ranks_dies_while_the_other_waits_for_it(tmp_path: Path) -> None:
    ended(begun(tmp_path, "left alone", "cluster.learner_ranks=2"))
    run, folder = begun(tmp_path, "ranks", "cluster.learner_ranks=2"), tmp_path / "ranks"
    await_(lambda: steps_done(folder) >= 2, "step 2", run)
    _, second = actors(run.pid, LEARNER)
    os.kill(second.pid, signal.SIGKILL)
    output = ended(run)
    assert "The learner was lost and is started again" in output
    assert status(folder)["prompts"]["trained"] == 8 * STEPS
    assert_same(folder, tmp_path / "left alone")


def engine_processes(run: int) -> list[psutil.Process]:
    """Of vLLM, where several share a model."""
    return [process for process in psutil.Process(run).children(recursive=True) if title(process).startswith("VLLM")]


def ready_for(run: int, folder: Path, step: int) -> bool:
    return steps_done(folder) >= step and len(engine_processes(run)) == 2


@pytest.mark.long
def test_every_process_of_a_shared_engine_may_die_or_freeze(tmp_path: Path) -> None:
    """vLLM's EngineCore is in the rollout worker itself, the shards of its model in processes beside it."""
    before = {path.name for path in SHARED_MEMORY.iterdir()}
    run, folder = begun(tmp_path, "shared", "rollout.tensor_parallel=2"), tmp_path / "shared"
    struck = []
    for step, core, number in ((1, False, signal.SIGKILL), (3, False, signal.SIGSTOP), (5, True, signal.SIGKILL)):
        await_(partial(ready_for, run.pid, folder, step), f"step {step}", run)
        shards = engine_processes(run.pid)
        (actors(run.pid, WORKER) if core else shards)[-1].send_signal(number)
        struck += shards
        await_(partial(ready_for, run.pid, folder, step + 2), "further steps", run)
    output = ended(run)
    assert not psutil.wait_procs(struck, timeout=30)[1], "shards of an engine that is gone"
    assert "of a rollout worker's engine is frozen" in output
    found = status(folder)
    assert (found["prompts"]["trained"], found["restarts"]) == (8 * STEPS, 3)
    assert {path.name for path in SHARED_MEMORY.iterdir()} <= before


@contextmanager
def hogged(cluster: Cluster) -> Iterator[None]:
    """Within, another program has all of the object store, and more."""
    hog = started_in(cluster, "-m", "tests.hog")
    try:
        assert hog.stdout is not None
        said = []
        for line in hog.stdout:
            said.append(line)
            if line.startswith("full"):
                break
        assert said and "filesystem mmap usage" in said[-1], "".join(said)
        yield
        assert hog.poll() is None
    finally:
        hog.kill()
        hog.wait()


def started_in(cluster: Cluster, *command: str) -> subprocess.Popen[str]:
    """A Python program whose Ray is this cluster, output to be read."""
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    return subprocess.Popen(
        [sys.executable, "-u", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )


FAR = """
import sys, ray
from actors.waiting import ActorLost, wait_for

ray.init(log_to_driver=False)

@ray.remote(num_cpus=0, resources={"far": 1})
class Far:
    def answer(self):
        return bytes(10**6)  # more than Ray sends along

far = Far.remote()
answer = far.answer.remote()
assert ray.wait([answer], fetch_local=False, timeout=60)[0]
print("answered", flush=True)
sys.stdin.readline()
try:
    wait_for([answer], 60, "The far actor", "cluster.deadline_seconds")
except ActorLost as error:
    print(error)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that takes no work and has a small object store, and three nodes of one CPU: two for a run, and a spare
    one."""
    with made_cluster(store_bytes=80 * 2**20) as made:
        for _ in range(3):
            add(made, num_cpus=1)
        yield made


@pytest.fixture(scope="module")
def lost_answer(cluster: Cluster) -> Iterator[subprocess.Popen[str]]:
    """A program that goes to fetch an answer whose node is gone, which Ray takes its time to notice."""
    node = add(cluster, num_cpus=0, resources={"far": 1})
    with started_in(cluster, "-c", FAR) as program, ending(program):
        assert program.stdout is not None and "answered\n" in iter(program.stdout.readline, "")
        cluster.remove_node(node, allow_graceful=False)
        assert program.stdin is not None
        print(file=program.stdin, flush=True)
        yield program


@pytest.mark.usefixtures("lost_answer")  # beside it
def test_pressure_costs_time_and_a_node_that_dies_with_the_learner_on_it_a_rewind(
    undisturbed: Path, cluster: Cluster, tmp_path: Path
) -> None:
    """First the object store is full and a worker ten times as slow; then a node is gone."""
    folder = tmp_path / "node"
    given = arguments(tmp_path, "node", *SETTINGS, "cluster.rollout_workers=2")
    with hogged(cluster):
        run = started_in(cluster, str(ROOT / "run_local.py"), *given)
        await_(lambda: steps_done(folder) >= 2, "step 2", run)
        (dies,) = [node for node in cluster.worker_nodes if actors(raylet(node), LEARNER)]
        (worker,) = [w for node in cluster.worker_nodes if node is not dies for w in actors(raylet(node), WORKER)]
        with slowed(worker, times=10):
            await_(lambda: steps_done(folder) >= 5, "the steps of a slow worker", run)
            assert status(folder)["restarts"] == 0
            sampling = [line["time/sample"] for line in lines(folder) if "time/sample" in line]
            cluster.remove_node(dies, allow_graceful=False)
    output = ended(run)
    assert median(sampling[3:]) > 4 * min(sampling), "it was slow"
    assert "everything goes back to step_000004" in output
    assert_same(folder, undisturbed)


def test_an_answer_that_is_lost_with_its_node_is_an_actor_lost(lost_answer: subprocess.Popen[str]) -> None:
    said, _ = lost_answer.communicate(timeout=90)
    assert "The far actor has answered, but its node died before the answer was fetched.\n" in said
