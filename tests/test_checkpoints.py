"""Checkpoints: written behind the loop's back, passed over when damaged, gone on with by other ranks and by `auto`."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import load_file, save_file

from cluster.checkpoints import DAMAGED_MANIFEST, MANIFEST, Checkpoints, LoopState, load_state, seal
from cluster.learner_group import LearnerGroup
from cluster.resume import cut_otherwise, find_resumed
from cluster.train import main
from configs.command_line import parse_arguments
from configs.errors import RunError, UsageError
from configs.loading import dump_config, load_config
from learner.checkpoint_writer import BackgroundWriter, FileFacts, described, write_tensors
from learner.memory_copies import MemoryCopies
from tests.small_run import arguments, metrics, status

MODEL = "model.safetensors"
LIMIT_BYTES = 1 << 20


class Ranks:
    """Stands where the learner's ranks do: writes a tensor of `size` floats as they do, once `go` is set."""

    def __init__(self, size: int = 16) -> None:
        self.go = threading.Event()
        self.go.set()
        self._size = size
        self._writer: BackgroundWriter[dict[str, FileFacts]] = BackgroundWriter()

    def begin_save(self, folder: Path) -> None:
        def write() -> dict[str, FileFacts]:
            assert self.go.wait(30)
            write_tensors({"weight": torch.zeros(self._size)}, folder / MODEL)
            return {MODEL: described(folder / MODEL)}

        self._writer.start(write)

    def saved(self, wait: bool) -> dict[str, FileFacts] | None:
        return self._writer.answer if self._writer.done(wait) else None

    @property
    def group(self) -> LearnerGroup:
        return cast(LearnerGroup, self)


def state(step: int, **more: Any) -> LoopState:
    return LoopState(step, 0, step, 1, 2, **more)


def save(checkpoints: Checkpoints, step: int, accuracy: float | None = None) -> Path:
    """A checkpoint of that step, whole."""
    learner = Ranks().group
    checkpoints.begin(learner, state(step, accuracy=accuracy, accuracy_strict=accuracy))
    path = checkpoints.poll(learner, wait=True)
    assert path is not None
    return path


def buffer(content: bytes) -> Callable[[Path], None]:
    """Writes the loop's own file."""

    def write(folder: Path) -> None:
        (folder / "buffer").write_bytes(content)

    return write


def names(checkpoints: Checkpoints) -> list[str]:
    return [path.name for path in checkpoints.all()]


# -- written behind the loop's back ---------------------------------------------------------------


def test_a_save_is_a_checkpoint_once_it_was_written_and_polled(tmp_path: Path) -> None:
    checkpoints, ranks = Checkpoints(tmp_path, keep=1), Ranks()
    old = save(checkpoints, 1)
    ranks.go.clear()
    checkpoints.begin(ranks.group, state(2), buffer(b"waiting"))
    assert checkpoints.poll(ranks.group) is None and checkpoints.newest() == old, "nobody waits for the disk"
    ranks.go.set()
    new = checkpoints.poll(ranks.group, wait=True)
    assert new is not None and checkpoints.all() == [new] and not old.exists()
    files = json.loads((new / MANIFEST).read_text())["files"]
    assert files == {name: described(new / name) for name in ("buffer", MODEL)}


def test_polling_alone_finishes_a_save(tmp_path: Path) -> None:
    heard: list[str] = []
    checkpoints, ranks = Checkpoints(tmp_path, 1, lambda: heard.append("sealed")), Ranks()
    checkpoints.begin(ranks.group, state(1))
    deadline = time.monotonic() + 20
    while (path := checkpoints.poll(ranks.group)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert load_state(path) == state(1) and heard == ["sealed"]


def test_once_settled_nothing_is_sealed_or_deleted_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, ranks = Checkpoints(tmp_path, keep=1), Ranks()
    old = save(checkpoints, 1)
    checkpoints.begin(ranks.group, state(2))
    assert ranks.saved(wait=True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(0.3))  # a disk that takes its time
    assert checkpoints.poll(ranks.group) is None and checkpoints.all() == [old]
    checkpoints.settle()
    assert names(checkpoints) == ["step_000002"] and not old.exists()


def test_what_a_rank_has_hashed_is_not_hashed_again(tmp_path: Path) -> None:
    (tmp_path / MODEL).write_bytes(b"1234")
    (tmp_path / "more").write_bytes(b"5")
    seal(tmp_path, state(1), {MODEL: {"bytes": 4, "sha256": "of the rank"}})
    files = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert files == {MODEL: {"bytes": 4, "sha256": "of the rank"}, "more": described(tmp_path / "more")}


@pytest.mark.parametrize("content", [None, b"12"])
def test_what_a_rank_wrote_and_the_driver_does_not_see_is_no_checkpoint(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / MODEL).write_bytes(content)
    with pytest.raises(OSError, match="No such file" if content is None else "a disk that all nodes share"):
        seal(tmp_path, state(1), {MODEL: {"bytes": 4, "sha256": "of the rank"}})
    assert not (tmp_path / MANIFEST).exists()


@contextmanager
def full_disk() -> Iterator[None]:
    """Within, no file of this process can grow over LIMIT_BYTES; the system refuses as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.faults
@pytest.mark.parametrize("who", ["a rank", "the driver"])
def test_a_full_disk_ends_the_run_and_leaves_the_newest_good_checkpoint(tmp_path: Path, who: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    good = save(checkpoints, 1)
    big = 2 * LIMIT_BYTES
    ranks = Ranks(size=big if who == "a rank" else 1)
    write_more = buffer(bytes(big if who == "the driver" else 1))

    def try_it() -> None:
        checkpoints.begin(ranks.group, state(2), write_more)
        checkpoints.poll(ranks.group, wait=True)

    with full_disk(), pytest.raises(RunError, match="could not be written") as raised:
        try_it()
    assert f"the newest good checkpoint is {good}" in str(raised.value)
    assert load_state(good).step == 1 and list(tmp_path.iterdir()) == [good]
    assert save(checkpoints, 2).exists(), "and with space again there is another"


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "Free disk space"), (errno.ENOMEM, "Free memory")])
def test_what_a_rank_lacked_is_said_in_a_line(tmp_path: Path, number: int, remedy: str) -> None:
    checkpoints, ranks = Checkpoints(tmp_path, keep=1), Ranks()
    checkpoints.begin(ranks.group, state(1))

    def fails(wait: bool) -> None:
        raise RayTaskError("saved", "its traceback", OSError(number, os.strerror(number))).as_instanceof_cause()

    ranks.saved = fails  # type: ignore[method-assign]
    with pytest.raises(RunError, match=rf"could not be written: .*{os.strerror(number)}\. {remedy}") as raised:
        checkpoints.poll(ranks.group, wait=True)
    assert "traceback" not in str(raised.value)


def test_copies_are_equal_apart_and_can_be_saved(tmp_path: Path) -> None:
    memory = MemoryCopies()
    originals = {
        "matrix": torch.randn(300, 70).T,
        "bfloat16": torch.randn(7).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "number": torch.tensor(3.0),
        "nothing": torch.empty(0, 4),
        "large": torch.randn(1 << 25),  # 128 MiB, more than a block
        "after": torch.randn(9),
    }
    copies = {name: memory.copy(tensor) for name, tensor in originals.items()}
    save_file(copies, tmp_path / "copies")
    saved = load_file(tmp_path / "copies")
    for name, tensor in originals.items():
        assert copies[name].is_contiguous() and copies[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor) and torch.equal(copies[name], tensor)
    originals["after"].zero_()
    assert copies["after"].any()
    places = [copy.data_ptr() for copy in copies.values()]
    memory.lend()
    again = [memory.copy(tensor) for tensor in originals.values()]
    assert [copy.data_ptr() for copy in again] == places, "in the same memory"
    assert all(torch.equal(copy, original) for copy, original in zip(again, originals.values(), strict=True))


# -- damaged --------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: (path / MODEL).unlink(), f"{MODEL} cannot be read"),
    "truncated": (lambda path: os.truncate(path / MODEL, 9), f"{MODEL} has 9 bytes"),
    "one bit flipped": (lambda path: flip(path / MODEL), f"{MODEL} is not what was written"),
    "manifest cut off": (lambda path: os.truncate(path / MANIFEST, 30), f"{MANIFEST} is no manifest"),
    "manifest empty": (lambda path: os.truncate(path / MANIFEST, 0), f"{MANIFEST} is no manifest"),
    "manifest of something else": (lambda path: (path / MANIFEST).write_text("[1]"), f"{MANIFEST} is no manifest"),
}


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, damage: str) -> None:
    checkpoints, said = Checkpoints(tmp_path, keep=3), list[str]()
    good, bad = save(checkpoints, 1, 0.5), save(checkpoints, 2, 0.9)
    harm, problem = DAMAGES[damage]
    harm(bad)
    assert checkpoints.best() is not None, "a damaged manifest stops nobody"
    found = checkpoints.newest_verified(said.append)
    assert found is not None and (found[0], found[1].step) == (good, 1)
    (line,) = said
    assert f"{bad.name} is damaged ({problem}" in line and f"{good.name} is used instead" in line and "\n" not in line
    assert bad.is_dir() and (bad / DAMAGED_MANIFEST).exists() and names(checkpoints) == [good.name]
    assert checkpoints.newest_verified(said.append) and len(said) == 1, "said once"
    assert save(checkpoints, 2) == bad and load_state(bad).step == 2, "and that step can be saved again"


def test_with_no_whole_checkpoint_the_files_are_named_and_kept(tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    checkpoints = Checkpoints(run / "checkpoints", keep=3)
    for step in (1, 2):
        flip(save(checkpoints, step) / MODEL)
    (run / "config.yaml").write_text(dump_config(load_config(None, [])))
    for _ in range(2):  # nothing was set aside, so it can be looked at again
        with pytest.raises(UsageError, match="there is no whole checkpoint"):
            find_resumed(str(run), load_config(None, []), said.append)
    assert len(said) == 4 and all(MODEL in line for line in said)


# -- gone on with otherwise -----------------------------------------------------------------------


def test_what_is_no_longer_exact_is_said_in_one_line() -> None:
    config = load_config(None, ["cluster.learner_ranks=2", "learner.zero_stage=3", "learner.optimizer=adamw_8bit"])
    text = cut_otherwise(config, state(4))
    assert text and "learner_ranks=1, zero_stage=2 to learner_ranks=2, zero_stage=3" in text and "\n" not in text
    assert "8-bit moments" in text and "no longer bit for bit" in text
    config = load_config(None, ["cluster.learner_ranks=2", "learner.optimizer=adamw"])
    assert "8-bit" not in (cut_otherwise(config, state(4)) or "8-bit")
    assert cut_otherwise(load_config(None, []), state(4)) is None


def a_run(runs: Path, name: str, age: float, state_now: str = "failed", pid: int = 1, saved: bool = True) -> Path:
    """A run's folder; its checkpoint was written `age` seconds ago."""
    run = runs / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config(None, [f"training.name={name}"])))
    (run / "status.json").write_text(json.dumps({"state": state_now, "pid": pid, "time": time.time()}))
    if saved:
        written = save(Checkpoints(run / "checkpoints", keep=1), 1) / MANIFEST
        os.utime(written, (time.time() - age,) * 2)
    return run


def test_auto_is_the_newest_run_that_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run in runs can be gone on with: none has a checkpoint"):
        parse_arguments(["--resume", "auto"], "run", "quickstart")
    runs = tmp_path / "runs"
    a_run(runs, "older", age=90)
    a_run(runs, "killed", age=60, state_now="running", pid=2**22 + 1)  # a number that no process has
    a_run(runs, "finished", age=10, state_now="finished")
    a_run(runs, "going-on", age=10, state_now="running", pid=os.getpid())
    a_run(runs, "without", age=10, saved=False)
    given = parse_arguments(["--resume", "auto", "training.steps=7"], "run", "quickstart")
    assert (given.resume, given.resume_auto, given.config_name) == ("runs/killed", True, "killed")
    assert (given.config.training.name, given.config.training.steps) == ("killed", 7)
    (runs / "killed" / "status.json").unlink()  # nothing says that it is finished
    assert parse_arguments(["--resume", "auto"], "run", "quickstart").resume == "runs/killed"
    shutil.rmtree(runs / "killed")
    shutil.rmtree(runs / "older")
    with pytest.raises(UsageError, match="the 2 with a checkpoint are finished or still going on"):
        parse_arguments(["--resume", "auto"], "run", "quickstart")


def test_auto_looks_where_it_is_told(tmp_path: Path) -> None:
    run = a_run(tmp_path / "elsewhere", "there", age=9)
    given = parse_arguments(["--resume", "auto", f"training.runs_dir={run.parent}"], "run", "quickstart")
    assert given.resume == str(run)
    with pytest.raises(UsageError, match=r"is a URL\. Name the run"):
        parse_arguments(["--resume", "auto", "training.runs_dir=s3://bucket/runs"], "run", "quickstart")
    with pytest.raises(UsageError, match=r"training\.seed=3 cannot be set with --resume"):
        parse_arguments(["--resume", "auto", f"training.runs_dir={run.parent}", "training.seed=3"], "run", "quickstart")


def test_a_run_goes_on_by_auto_from_the_checkpoint_before_with_another_rank(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert main(arguments(runs, "run", "learner.optimizer=adamw")) == 0
    run = Path(shutil.copytree(runs / "run", tmp_path / "again" / "run"))
    flip(run / "checkpoints" / "step_000004" / "trainer" / "rank_0.safetensors")
    (run / "status.json").write_text(json.dumps({"state": "failed", "pid": 1, "time": 0}))
    capsys.readouterr()
    asked = ["--resume", "auto", f"training.runs_dir={run.parent}", "cluster.learner_ranks=2", "learner.zero_stage=3"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert f"--resume auto: going on with {run}" in said
    assert "step_000004 is damaged (trainer/rank_0.safetensors is not" in said and "step_000002 is used" in said
    assert "from learner_ranks=1, zero_stage=2 to learner_ranks=2, zero_stage=3" in said
    assert status(run)["state"] == "finished" and len(metrics(run)) == len(metrics(runs / "run"))
    ours, theirs = (load_file(each / "checkpoints" / "step_000004" / MODEL) for each in (run, runs / "run"))
    before = load_file(run / "checkpoints" / "step_000002" / MODEL)
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5
    gone = sum(float((before[name] - theirs[name]).square().sum()) for name in ours) ** 0.5
    assert 0 < apart < 1e-2 * gone
