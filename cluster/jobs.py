"""The Ray job that this driver is: what was submitted, where it stands, how long it has to stop."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

DESCRIPTION = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray puts the job's description into a variable of this very name
STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S"
DEFAULT_STOP_SECONDS = 3


@dataclass(frozen=True)
class Job:
    """working_dir: Ray's copy of what was submitted, where the driver starts; None if nothing was.

    env_vars: names of the variables that the job's runtime environment sets.
    """

    submission_id: str
    working_dir: Path | None
    env_vars: frozenset[str]
    stop_seconds: int

    def ships(self, path: Path) -> bool:
        """Whether this path is part of Ray's copy, which every node has and Ray deletes after the job."""
        return self.working_dir is not None and path.resolve().is_relative_to(self.working_dir.resolve())


def current_job() -> Job | None:
    """The job of this process, or None where no `ray job submit` started it."""
    text = os.environ.get(DESCRIPTION)
    if text is None:
        return None
    described = json.loads(text)
    environment = described.get("runtime_env") or {}
    return Job(
        submission_id=(described.get("metadata") or {}).get("job_submission_id", "of an unknown id"),
        working_dir=_unpacked() if environment.get("working_dir") else None,
        env_vars=frozenset(environment.get("env_vars") or {}),
        stop_seconds=int(os.environ.get(STOP_SECONDS, DEFAULT_STOP_SECONDS)),
    )


def _unpacked() -> Path:
    """The folder that Ray unpacked and put in front of PYTHONPATH; the driver is started in it."""
    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    return Path(first) if first else Path.cwd()


def unlasting_runs_dir(runs_dir: str, job: Job | None) -> str | None:
    """What is wrong with training.runs_dir in a job whose working directory Ray will delete; None if nothing is."""
    folder = Path(runs_dir).expanduser()
    if job is None or (folder.is_absolute() and not job.ships(folder)):
        return None
    kind = "lies in" if folder.is_absolute() else "is relative, so it would lie in"
    return (
        f"training.runs_dir={runs_dir} {kind} the job's working directory, which Ray deletes after the job: give an "
        "absolute path on a disk that stays (training.runs_dir=/shared/runs) or a URL (training.runs_dir=s3://bucket/runs)"
    )


def stop_notice(job: Job) -> str:
    """What to know of `ray job stop`, said when the job starts."""
    return (
        f"job {job.submission_id}: `ray job stop` gives it {job.stop_seconds} s to end its step and write a checkpoint "
        f'(more: --runtime-env-json \'{{"env_vars": {{"{STOP_SECONDS}": "600"}}}}\')'
    )
