"""A Ray cluster for the run: the one there is, or a local one that ends with it."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cluster.jobs import current_job
from cluster.placement import port_is_free
from cluster.ray_access import asks_for_token, check_token, loopback, make_token
from configs.errors import RunError, UsageError

OBJECT_STORE_BYTES = 512 * 2**20
PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])
_HOST_AND_PORT = re.compile(r"[^/]+:[0-9]+")  # not "auto", nor ray://, which is no driver's way in


@contextmanager
def ray_session(dashboard_port: int | str) -> Iterator[str]:
    """Yields a line that says where the dashboard is. Ray is shut down after, if it was started here."""
    if ray.is_initialized():
        yield "Ray was already running in this process"
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS", "local")
    if address != "local":
        asks = check_token(address) if _HOST_AND_PORT.fullmatch(address) and not _uses_tls() else True
        with _sigterm_kept():
            context = _join(address)
    else:
        asks, dashboard = asks_for_token(), dashboard_options(dashboard_port)
        with _sigterm_kept(), loopback():
            context = _start_local(dashboard)
    try:
        yield _dashboard_line(context.dashboard_url, asks)
    finally:
        ray.shutdown()


def dashboard_options(wanted: int | str) -> dict[str, Any]:
    """What `ray.init` is told of the dashboard; UsageError if its port is taken.

    For `auto` Ray tries from 8265 up, one after another: two runs that start together would find the same port free,
    and only who binds it knows.
    """
    if wanted == "off":
        return {"include_dashboard": False}
    port = None if wanted == "auto" else int(wanted)
    if port is not None and not port_is_free(port):
        raise UsageError(
            f"cluster.dashboard_port={port} is taken by another program on this machine. Choose another port, "
            "or leave cluster.dashboard_port=auto."
        )
    return {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}


_QUIET = {
    "DS_ACCELERATOR": "cpu",  # of this process, which only imports it; every actor is told its own
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_task_events_max_num_task_in_gcs": "10000",  # the history that the dashboard shows
    "RAY_kill_worker_timeout_milliseconds": "500",  # of a process that is to be killed and does not answer
}


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of ours, which would end a run without its last words."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _environment() -> dict[str, Any]:
    """Actors import our packages from where this process found them, wherever it was started.

    Of a job that ships them Ray unpacks a copy on every node, and puts that first itself; and Ray refuses a
    variable that the job's own runtime environment sets.
    """
    job = current_job()
    if job is not None and (job.ships(Path(PACKAGE_ROOT)) or "PYTHONPATH" in job.env_vars):
        return {}
    paths = [PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}


def _join(address: str) -> Any:
    """The cluster that RAY_ADDRESS names; UsageError if there is none that can be joined."""
    try:
        return ray.init(runtime_env=_environment(), log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, TimeoutError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UsageError(
            f"RAY_ADDRESS={address} names no Ray cluster that can be joined: {reason}. Give HOST:PORT of a running one "
            "(`ray start --head` prints it, its port is 6379 by default), or unset RAY_ADDRESS for a local cluster."
        ) from error


def _start_local(dashboard: dict[str, Any]) -> Any:
    make_token()
    try:
        return ray.init(
            address="local",
            **dashboard,
            object_store_memory=OBJECT_STORE_BYTES,
            runtime_env=_environment(),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # a dashboard that does not start is a bare Exception of Ray's
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        raise RunError(
            f"Ray could not be started here: {reason.rstrip('.')}. Look for Ray processes left over from another run "
            "(`ray stop` ends them) and for free space in /tmp and /dev/shm."
        ) from error


def _uses_tls() -> bool:
    """Ray's own switch. Who may join is then a matter of certificates as well, and Ray says what it makes of ours."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _dashboard_line(url: str | None, asks: bool) -> str:
    """Where the dashboard is and who is let in; a warning where that is everybody."""
    where = f"Ray dashboard: http://{url}" if url else "no Ray dashboard"
    notes = ["on loopback"] if url and url.startswith(("127.", "localhost:")) else []
    if asks:
        notes += ["it asks for a token, which `ray get-auth-token` prints"] if url else []
        return f"{where} ({'; '.join(notes)})" if notes else where
    return (
        f"{where}{f' ({notes[0]})' if notes else ''}; warning: this cluster asks for no token, so whoever reaches it "
        "may run anything on it; start it with RAY_AUTH_MODE=token"
    )
