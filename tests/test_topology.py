"""Every placement on one and two nodes of a logical cluster learns what the smallest run learns: a covering set.

The drivers are processes of their own that attach to a cluster made here; its nodes hold as much as makes the
placement spread over them, and GPUs that are only numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from benchmarks.made_cluster import add, made_cluster
from data.rollouts import read_groups
from tests.small_run import CACHE, ROOT, metrics

STEPS, BATCH, STALENESS = 2, 4, 1
COMMON = (
    "training.steps=2",
    "rollout.prompts_per_batch=4",
    "rollout.completions_per_prompt=4",
    "rollout.kv_cache_mb=16",
    "data.held_out_problems=4",
    "model.warm_start.steps=60",
    "learner.optimizer=adamw",  # 8-bit states are quantised in blocks, which ranks cut elsewhere
    "learner.threads=1",
    f"model.cache_dir={CACHE}",
    "telemetry.live=off",
)


@dataclass(frozen=True)
class Topology:
    """A run's shape, and what each node of its cluster has."""

    nodes: int
    workers: int
    ranks: int
    placement: str
    regime: str
    cpus: int
    gpus: int = 0

    @property
    def name(self) -> str:
        return f"{self.nodes}n-{self.workers}w-{self.ranks}r-{self.placement}-{self.regime}-{self.gpus}g"

    @property
    def settings(self) -> list[str]:
        zero = 3 if self.placement == "disaggregated" and self.ranks == 2 else 2
        return [
            f"training.name={self.name}",
            f"cluster.rollout_workers={self.workers}",
            f"cluster.learner_ranks={self.ranks}",
            f"cluster.placement={self.placement}",
            f"cluster.max_staleness={STALENESS if self.regime == 'async' else 0}",
            f"learner.zero_stage={zero}",
        ]


SET = [
    Topology(1, 1, 1, "colocated", "sync", cpus=1),
    Topology(2, 1, 2, "disaggregated", "async", cpus=1, gpus=2),
    Topology(1, 2, 2, "colocated", "sync", cpus=2, gpus=2),
    Topology(2, 2, 1, "disaggregated", "async", cpus=1),
    Topology(2, 3, 1, "colocated", "sync", cpus=1),
    Topology(1, 3, 2, "disaggregated", "async", cpus=3, gpus=5),
    Topology(2, 4, 2, "colocated", "sync", cpus=2, gpus=1),
    Topology(1, 4, 1, "disaggregated", "async", cpus=3),
    Topology(2, 1, 1, "disaggregated", "sync", cpus=1, gpus=1),
]
DRIVER = """
import json, sys
import ray
from cluster.train import main
from ray.util.state import list_actors

ray.init(address=sys.argv[1], log_to_driver=False)
code = main(json.loads(sys.argv[2]))
job = ray.get_runtime_context().get_job_id()
seats = [[a.class_name, a.node_id] for a in list_actors(filters=[("job_id", "=", job)], limit=1000)]
print("SEATS", json.dumps(seats))
sys.exit(code)
"""


def test_the_set_covers_every_pair_that_can_be() -> None:
    factors: dict[str, tuple[Any, ...]] = {
        "nodes": (1, 2),
        "workers": (1, 2, 3, 4),
        "ranks": (1, 2),
        "placement": ("colocated", "disaggregated"),
        "regime": ("sync", "async"),
    }
    shapes = [asdict(topology) for topology in SET]
    for (one, ones), (other, others) in combinations(factors.items(), 2):
        for a, b in product(ones, others):
            possible = {one: a, other: b} != {"placement": "colocated", "regime": "async"}
            assert not possible or any(shape[one] == a and shape[other] == b for shape in shapes), (one, a, other, b)
    assert len(SET) <= 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without resources; every run adds its nodes."""
    with made_cluster() as made:
        yield made


def run(cluster: Cluster, topology: Topology, folder: Path) -> list[list[str]]:
    """Train on a cluster of this topology; class and node of every actor."""
    nodes = [add(cluster, num_cpus=topology.cpus, num_gpus=topology.gpus) for _ in range(topology.nodes)]
    try:
        arguments = ["--config", "quickstart", f"training.runs_dir={folder}", *COMMON, *topology.settings]
        command = [sys.executable, "-c", DRIVER, cluster.address, json.dumps(arguments)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        for node in nodes:
            cluster.remove_node(node)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEATS ")]
    return json.loads(line.removeprefix("SEATS "))


@pytest.fixture(scope="module")
def smallest(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one worker and one rank that take turns."""
    folder = tmp_path_factory.mktemp("smallest")
    run(cluster, SET[0], folder)
    return folder / SET[0].name


@pytest.mark.parametrize("topology", SET[1:], ids=lambda topology: topology.name)
def test_it_learns_what_the_smallest_learns(
    topology: Topology, cluster: Cluster, smallest: Path, tmp_path: Path
) -> None:
    seats = run(cluster, topology, tmp_path)
    folder = tmp_path / topology.name
    assert sum(name == "RolloutWorker" for name, _ in seats) == topology.workers
    assert sum(name == "LearnerRank" for name, _ in seats) == topology.ranks
    assert len({node for _, node in seats}) == topology.nodes
    lines = [line for line in metrics(folder) if "policy/loss" in line]
    for step, line in enumerate(lines, start=1):
        groups = read_groups(folder / "rollouts" / f"step_{step:06d}.parquet")
        assert [group.prompt.visit for group in groups] == list(range(BATCH * (step - 1), BATCH * step))
        assert line["rollout/logprob_diff_max"] < 1e-4
        assert line["rollout/staleness_max"] <= (STALENESS if topology.regime == "async" else 0)
    expected = [line for line in metrics(smallest) if "policy/loss" in line]
    assert lines[0]["reward/mean"] == expected[0]["reward/mean"]  # whatever came later, all began alike
    assert lines[0]["policy/loss"] == pytest.approx(expected[0]["policy/loss"], abs=1e-6)
    if topology.regime == "sync":
        ours, theirs = (load_file(f / "checkpoints" / "step_000002" / "model.safetensors") for f in (folder, smallest))
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-4
