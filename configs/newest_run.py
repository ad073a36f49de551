"""Which run `--resume auto` means."""

from __future__ import annotations

import json
from pathlib import Path

import psutil

from configs.errors import UsageError
from configs.urls import is_url

AUTO = "auto"  # `./auto` is a folder of that name


def newest_run(runs_dir: str) -> str:
    """The folder of the run that got a checkpoint last, of those that are not finished and have no process any more.

    UsageError if there is none.
    """
    if is_url(runs_dir):
        raise UsageError(
            f"--resume {AUTO} looks for runs in a folder, and training.runs_dir={runs_dir} is a URL. Name the run: "
            f"--resume {runs_dir.rstrip('/')}/NAME."
        )
    folder = Path(runs_dir).expanduser()
    saved = [(_last_checkpoint(path.parent), path.parent) for path in folder.glob("*/config.yaml")]
    runs = [(time, run) for time, run in saved if time]
    open_runs = [(time, run) for time, run in runs if not _over_or_going_on(run)]
    if not open_runs:
        found = f"the {len(runs)} with a checkpoint are finished or still going on" if runs else "none has a checkpoint"
        raise UsageError(
            f"--resume {AUTO}: no run in {folder} can be gone on with: {found}. "
            "Name a run's folder, or set training.runs_dir to where the runs are."
        )
    return str(max(open_runs)[1])


def _last_checkpoint(run: Path) -> float:
    """When the run's newest checkpoint was written; 0 if it has none."""
    return max((path.stat().st_mtime for path in run.glob("checkpoints/step_*/manifest.json")), default=0.0)


def _over_or_going_on(run: Path) -> bool:
    try:
        status = json.loads((run / "status.json").read_text())
        state, pid, time = status["state"], status["pid"], status["time"]
    except (OSError, ValueError, TypeError, KeyError):  # lost or cut off: nothing says that it is
        return False
    if state not in ("starting", "running"):
        return bool(state == "finished")
    try:
        return bool(psutil.Process(pid).create_time() <= time)  # or another process has its number by now
    except psutil.Error:
        return False
