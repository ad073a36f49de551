"""A run's folder: resolved config, status, one line of metrics a step, rollouts, TensorBoard, checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import RunError, UsageError
from data.records import Group
from data.rollouts import write_groups


class RunFolder:
    """Paths and small files of one run. What cannot be written is a RunError that names it."""

    def __init__(self, path: Path, changed: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.changed = changed  # called when there is something new that is worth a copy elsewhere
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.references = path / "references"
        self.optimal_values = path / "optimal_values.json"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, path: Path, config_text: str) -> RunFolder:
        """A new folder with its config.yaml; UsageError if it holds a run already."""
        folder = cls(path)
        if (folder.path / "config.yaml").exists():
            raise UsageError(
                f"The run folder {folder.path} already holds a run. Go on with it by --resume {folder.path}, "
                "or choose another training.name."
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            (folder.path / "config.yaml").write_text(config_text)
        except OSError as error:
            raise UsageError(
                f"The run folder {folder.path} cannot be written: {error}. Choose another training.runs_dir."
            ) from error
        return folder

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"step_{step:06d}.parquet"

    def write_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        with written(self.rollouts(step)):
            write_groups(self.rollouts(step), groups)

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        with written(self.metrics), self.metrics.open("a") as out:
            out.write(json.dumps({"step": step, **metrics}) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line so far, oldest first; a last line cut off by a kill does not count."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Forget metrics and rollouts of steps after `step`: they will be computed again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        _write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        for path in self.path.glob("rollouts/step_*"):
            if path.suffix != ".parquet" or int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def write_status(self, state: str, **facts: Any) -> None:
        """status.json: `running`, `finished`, `interrupted` or `failed`, and what else is worth knowing."""
        status = {"state": state, "pid": os.getpid(), "time": time.time(), **facts}
        with written(self._status):
            _write_whole(self._status, json.dumps(status, indent=1) + "\n")

    def write_failure(self, error: BaseException, resume: str | None) -> None:
        """status.json: `failed`, with the error and how to go on, beside what was known before."""
        known = json.loads(self._status.read_text())
        del known["state"], known["pid"], known["time"]
        self.write_status("failed", **known, error=f"{type(error).__name__}: {error}", resume=resume)

    @property
    def _status(self) -> Path:
        return self.path / "status.json"


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Within, an OSError becomes a RunError that says which file it is and what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror or error}. Make room on its disk, or mend it, and go on "
            "from the newest checkpoint with --resume."
        ) from error


def _write_whole(path: Path, text: str) -> None:
    """The file has either its old or its new content, never a part."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text)
    draft.replace(path)
