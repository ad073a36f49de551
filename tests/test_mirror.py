"""A run at a URL: whole checkpoints only, failures said and retried, never lost, and fetched again as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.checkpoints import LoopState, load_state, seal
from cluster.mirror import Mirror, fetch_run, holds_run, mirrored, newest_at
from cluster.run_folder import RunFolder
from cluster.run_place import leave, new_place, resumed_place
from configs.command_line import parse_arguments
from configs.errors import RunError, UsageError
from configs.loading import load_config
from configs.within import within
from tests.small_run import SMALL

SECONDS = 20.0
NO_PAUSES = (0.01, 0.01)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where runs go: fsspec's memory, which is no folder, and a folder by its URL."""
    if request.param == "file":
        yield f"file://{tmp_path}/there"
        return
    yield f"memory://{tmp_path.name}/there"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(f"/{tmp_path.name}"):
        filesystem.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "here" / "run", "training: {steps: 9}\n")
    run.append_metrics(1, {"reward/mean": 0.5})
    return run


def checkpoint(run: RunFolder, step: int, content: bytes = b"weights", whole: bool = True) -> Path:
    path = run.checkpoints / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    if whole:
        seal(path, LoopState(step, 0, step, 1, 0))
    return path


def delete(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()


def listing(place: str | Path) -> dict[str, bytes]:
    """Every file there, by its path."""
    if isinstance(place, Path):
        return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    filesystem, root = fsspec.core.url_to_fs(place)
    return {path.removeprefix(f"{root}/"): filesystem.cat_file(path) for path in filesystem.find(root)}


def closed(run: RunFolder, url: str) -> None:
    with mirrored(run, url, lambda _: None, SECONDS):
        run.changed()


def test_all_of_a_run_is_there_at_the_end_but_for_what_is_half_written(folder: RunFolder, url: str) -> None:
    checkpoint(folder, 1)
    checkpoint(folder, 2, whole=False)
    (folder.path / "metrics.jsonl.draft").write_text("half")
    folder.write_status("finished")
    closed(folder, url)
    here = listing(folder.path)
    del here["checkpoints/step_000002/model.safetensors"], here["metrics.jsonl.draft"]
    assert listing(url) == here


def test_a_run_is_copied_while_it_goes_on(folder: RunFolder, url: str) -> None:
    with mirrored(folder, url, lambda _: None, SECONDS):
        assert holds_run(url), "before anything is loaded"
        checkpoint(folder, 1)
        folder.changed()
        until(lambda: newest_at(url) == "step_000001")


def test_pruned_checkpoints_leave_the_url_and_rewritten_ones_are_sent_again(folder: RunFolder, url: str) -> None:
    first = checkpoint(folder, 1)
    checkpoint(folder, 2)
    closed(folder, url)
    delete(first)
    delete(folder.checkpoints / "step_000002")
    checkpoint(folder, 2, b"other weights")
    closed(folder, url)
    assert listing(url) == listing(folder.path)


def test_a_fetched_run_is_the_run(folder: RunFolder, url: str, tmp_path: Path) -> None:
    checkpoint(folder, 1)
    closed(folder, url)
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.makedirs(f"{root}/checkpoints/step_000002", exist_ok=True)
    filesystem.pipe_file(f"{root}/checkpoints/step_000002/model.safetensors", b"cut off")
    fetch_run(url, tmp_path / "fetched", SECONDS)
    assert listing(tmp_path / "fetched") == listing(folder.path)
    assert load_state(tmp_path / "fetched" / "checkpoints" / "step_000001").step == 1


class Flaky:
    """A filesystem of which the first `failures` writes fail."""

    def __init__(self, filesystem: Any, failures: float) -> None:
        self._filesystem, self.failures = filesystem, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._filesystem, name)

    def put_file(self, here: str, there: str) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise OSError("503 Slow Down")
        self._filesystem.put_file(here, there)


def test_a_failure_is_said_and_tried_again(folder: RunFolder, url: str) -> None:
    said: list[str] = []
    mirror = Mirror(folder.path, url, said.append, SECONDS, NO_PAUSES)
    mirror.open()
    checkpoint(folder, 1)
    mirror._filesystem = Flaky(mirror._filesystem, 2)
    mirror.close()
    assert listing(url) == listing(folder.path)
    assert len(said) == 2 and all("503 Slow Down" in text for text in said)


class Rewriting(Flaky):
    """A filesystem during whose first write the checkpoint is deleted and written anew, with other lengths between."""

    def __init__(self, filesystem: Any, run: RunFolder) -> None:
        super().__init__(filesystem, 0)
        self._run = run

    def put_file(self, here: str, there: str) -> None:
        super().put_file(here, there)
        if self.failures == 0 and "step_000001" in here:
            self.failures = -1
            delete(self._run.checkpoints / "step_000001")
            path = checkpoint(self._run, 1, b"half", whole=False)
            super().put_file(str(path / "model.safetensors"), there)
            delete(path)
            checkpoint(self._run, 1)


def test_a_checkpoint_written_anew_while_copied_is_no_mixture(folder: RunFolder, url: str, tmp_path: Path) -> None:
    mirror = Mirror(folder.path, url, lambda _: None, SECONDS, NO_PAUSES)
    mirror.open()
    checkpoint(folder, 1)
    mirror._filesystem = Rewriting(mirror._filesystem, folder)
    mirror.request()
    until(lambda: mirror._filesystem.failures == -1 and not mirror._wanted.is_set())
    mirror.close()
    fetch_run(url, tmp_path / "fetched", SECONDS)
    assert load_state(tmp_path / "fetched" / "checkpoints" / "step_000001").step == 1


def test_a_url_that_stays_away_stops_nothing_and_loses_nothing_silently(folder: RunFolder, url: str) -> None:
    said: list[str] = []
    mirror = Mirror(folder.path, url, said.append, SECONDS, NO_PAUSES)
    mirror.open()
    checkpoint(folder, 1)
    mirror._filesystem = Flaky(mirror._filesystem, float("inf"))
    mirror.request()
    until(lambda: any("the run goes on" in text for text in said))
    with pytest.raises(RunError, match="is whole in") as raised:
        mirror.close()
    assert str(folder.path) in str(raised.value) and "503 Slow Down" in str(raised.value)
    assert newest_at(url) == "", "no manifest stands there without its files"


def test_a_url_that_hangs_is_waited_for_no_longer_than_the_deadline() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"Writing took longer than 0\.05 s"):
        within(0.05, never.wait, "Writing")
    never.set()


def test_a_url_that_does_not_answer_when_a_run_is_resumed_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    filesystem, _ = fsspec.core.url_to_fs(url)
    monkeypatch.setattr(type(filesystem), "cat_file", lambda *_: never.wait())
    monkeypatch.setattr("configs.urls.SECONDS", 0.05)
    with pytest.raises(UsageError, match=rf"{url} cannot be read: TimeoutError: Looking at {url} took longer than"):
        parse_arguments(["--resume", url], "prog", "quickstart")
    never.set()


def test_a_url_that_cannot_be_written_is_refused_at_once(folder: RunFolder) -> None:
    with pytest.raises(UsageError, match=r"file:///proc/runs cannot be written.*training\.runs_dir"):
        Mirror(folder.path, "file:///proc/runs", lambda _: None, SECONDS).open()


def test_the_runs_own_error_comes_before_the_mirrors(folder: RunFolder, url: str) -> None:
    folder.write_status("failed")
    with pytest.raises(RunError, match="log-probs"), mirrored(folder, url, lambda _: None, SECONDS):
        raise RunError("log-probs are not the learner's")
    assert b"failed" in listing(url)["status.json"]


def test_a_second_run_of_the_same_name_is_refused(folder: RunFolder, url: str, tmp_path: Path) -> None:
    config = load_config(SMALL, [f"training.runs_dir={url}", "training.name=run", f"model.cache_dir={tmp_path}"])
    assert str(new_place(config, "small")) == f"{url}/run"
    closed(folder, f"{url}/run")
    with pytest.raises(UsageError, match="already holds a run"):
        new_place(config, "small")


def test_resuming_takes_whichever_is_ahead(folder: RunFolder, url: str, tmp_path: Path) -> None:
    config = load_config(SMALL, [f"model.cache_dir={tmp_path / 'cache'}"])
    checkpoint(folder, 1)
    closed(folder, f"{url}/run")
    said: list[str] = []
    place = resumed_place(f"{url}/run/", config, said.append)
    assert listing(place.folder) == listing(folder.path) and "fetching" in said[-1]
    checkpoint(RunFolder(place.folder), 5)  # written here, and then killed before it was copied
    assert resumed_place(f"{url}/run", config, said.append) == place
    assert "step_000005, which is ahead" in said[-1]
    closed(RunFolder(place.folder), f"{url}/run")
    leave(place)
    assert resumed_place(f"{url}/run", config, said.append) == place and "fetching" in said[-1]
    assert (place.folder / "checkpoints" / "step_000005" / "manifest.json").exists()


def test_resuming_a_url_that_holds_no_run_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"has no config\.yaml|does not exist"):
        parse_arguments(["--resume", f"{url}/nothing"], "prog", "quickstart")


def until(condition: Any) -> None:
    event = threading.Event()
    for _ in range(200):
        if condition():
            return
        event.wait(0.05)
    raise AssertionError("waited 10 s in vain")
