"""Jobs on a cluster that runs already: what is uploaded, what is refused, a run seen, stopped and resumed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from ray._private.runtime_env.packaging import create_package

from tests.processes import title
from tests.running_cluster import RunningCluster, running_cluster, wait_until
from tests.small_run import CACHE, ROOT, SMALL, metrics, status

JOB_SECONDS = 280.0
STOP_SECONDS = 30.0
ACTORS = ("ray::RolloutWorker", "ray::LearnerRank", "ray::Verifier")
UPLOAD_BYTES = 4 * 2**20
pytestmark = pytest.mark.timeout(900)  # two whole runs and a cluster, on machines that do other work, too


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster() as there:
        yield there
    assert there.processes() == [], "nothing of the cluster may be left"


def titles(cluster: RunningCluster, *words: str) -> list[str]:
    """Of its living processes, those that have one of the words."""
    return [name for name in map(title, cluster.processes()) if any(word in name for word in words)]


def train(*arguments: str) -> list[str]:
    return ["python", "-m", "cluster.train", *arguments]


def package(folder: Path, target: Path) -> int:
    """Bytes of what Ray would upload of a folder."""
    create_package(str(folder), target, include_gitignore=True, excludes=[])
    return target.stat().st_size


def test_the_upload_carries_the_code_and_nothing_large(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "cluster").mkdir(parents=True)
    (project / "cluster" / "train.py").write_text("code")
    for name in (".venv", ".venv-trl", "runs/a/checkpoints", ".git/objects", ".mypy_cache", "cluster/__pycache__"):
        (project / name).mkdir(parents=True)
        (project / name / "large").write_bytes(bytes(range(256)) * 16)
    elsewhere = tmp_path / "environment"
    shutil.copytree(project / ".venv", elsewhere)
    (project / ".venv-linked").symlink_to(elsewhere)
    assert package(project, tmp_path / "without.zip") > 1000, "the planted folders are seen"
    shutil.copy(ROOT / ".rayignore", project)
    package(project, tmp_path / "with.zip")
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(tmp_path / "with.zip")], capture_output=True, text=True, check=True
    ).stdout
    assert "cluster/train.py" in listed and "large" not in listed


def test_the_manifest_is_a_ray_job_that_trains() -> None:
    job = yaml.safe_load((ROOT / "docker" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert "python -m cluster.train --config" in spec["entrypoint"] and "training.runs_dir=/" in spec["entrypoint"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in environment.values())
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 60
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    version = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("ray=="))
    assert version == f"ray=={cluster['rayVersion']}"
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        runs = re.search(r"training\.runs_dir=(/\w+)", spec["entrypoint"])
        assert runs and volumes[mounts[runs[1]]]["persistentVolumeClaim"], "every pod sees the run folder"


def test_the_image_pins_what_the_project_says() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    vllm = re.search(r'gpu = \["(vllm==[\d.]+)"\]', project)
    assert vllm and vllm[1] in dockerfile
    assert "--no-deps" in dockerfile and "requirements.lock" in dockerfile


def test_the_api_asks_for_the_token(cluster: RunningCluster) -> None:
    assert requests.get(f"{cluster.address}/api/jobs/", timeout=30).status_code == 401


def test_a_run_is_seen_stopped_and_resumed(cluster: RunningCluster, tmp_path: Path) -> None:
    """The head hosts the driver, the other node every actor: each imports our packages from its own copy."""
    runs = f"training.runs_dir=file://{tmp_path}/there"
    where = (f"--config={SMALL.relative_to(ROOT)}", runs, f"model.cache_dir={CACHE}", "training.name=run")
    cluster.submit("stopped", *train(*where, "training.steps=100000", "checkpoint.every=2"))
    cluster.submit("refused", *train("training.steps=1"))
    there = tmp_path / "there" / "run"
    wait_until((there / "checkpoints" / "step_000002" / "manifest.json").exists, JOB_SECONDS, "a mirrored checkpoint")
    assert len(titles(cluster, *ACTORS)) == 3
    cluster.ray_job("stop", "stopped")
    assert cluster.state("stopped") == "STOPPED"
    wait_until(lambda: not titles(cluster, *ACTORS), STOP_SECONDS, "the end of the stopped job's actors")
    log = cluster.log("stopped")
    assert "\x1b" not in log and "Traceback" not in log and "SIGTERM received" not in log
    assert log.index("run folder: file://") < log.index("Ray dashboard") < log.index("step    1  reward")
    assert "`ray job stop` gives it 3 s" in log
    stopped = status(there)
    again = f"ray job submit --working-dir . -- python -m cluster.train --resume file://{there}"
    assert stopped["state"] == "interrupted" and stopped["resume"] == again
    assert (there / "checkpoints" / f"step_{stopped['step']:06d}" / "manifest.json").exists()

    last = stopped["step"] + 1
    command = again.split(" -- ")[1].split()
    cluster.submit("resumed", *command, f"training.steps={last}")
    assert "error: training.runs_dir=runs is relative" in cluster.wait("refused", JOB_SECONDS)
    assert f"step {last:>4}  reward" in cluster.wait("resumed", JOB_SECONDS)
    assert [line["step"] for line in metrics(there) if "policy/loss" in line] == list(range(1, last + 1))
    assert status(there)["state"] == "finished"
    assert not list(CACHE.glob("runs/*/run")), "the working folder is deleted when all is at the URL"
    sizes = [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in cluster.unpacked()]
    assert sizes and max(sizes) < UPLOAD_BYTES
    wait_until(lambda: not titles(cluster, "cluster.train"), STOP_SECONDS, "the end of the drivers")


def test_a_node_without_the_model_is_given_it_or_named(cluster: RunningCluster, tmp_path: Path) -> None:
    if not cluster.hides:
        pytest.skip("this system allows no mount namespace, so both nodes see the same folders")
    cluster.submit("models", "python", "-m", "tests.bring_models", str(cluster.hidden), str(tmp_path / "model"))
    arguments = (f"--config={SMALL.relative_to(ROOT)}", f"training.runs_dir={cluster.hidden}/runs")
    cluster.submit("unshared", *train(*arguments, f"model.cache_dir={CACHE}"))
    # After it Ray may say that the worker which was told to hang has died.
    (line,) = [line for line in cluster.wait("models", JOB_SECONDS).splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert found["shared"] == "brought to 0"
    assert found["made"] == "brought to 1" and found["again"] == "brought to 0"
    assert f"{cluster.hidden}/model is not on the node" in found["missing"] and "Copy it there" in found["missing"]
    assert "holds another model" in found["other"]
    assert "nobody/no-such-model is not on the node" in found["hub"] and "hf download" in found["hub"]
    assert [Path(path).is_relative_to(cluster.folder / "node") for path in found["packages"]] == [True]
    assert found["told to stop"], "Ray's own SIGTERM handler would end a starting run without its last words"
    assert "did not answer within 1 s (hang)" in found["late"]
    log = cluster.wait("unshared", JOB_SECONDS)
    assert "is not the same disk on" in log and "training.runs_dir" in log
    assert not list((cluster.hidden / "runs").iterdir()), "a refused run leaves nothing"
