"""A Ray cluster for the run: the one there is, or a local one that ends with it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cluster.jobs import current_job
from cluster.placement import port_is_free
from configs.errors import RunError, UsageError

JOIN_SECONDS = 15.0
OBJECT_STORE_BYTES = 512 * 2**20
PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])


@contextmanager
def ray_session(dashboard_port: int | str) -> Iterator[str]:
    """Yields a line that says where the dashboard is. Ray is shut down after, if it was started here."""
    if ray.is_initialized():
        yield "Ray was already running in this process"
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if address := os.environ.get("RAY_ADDRESS"):
        with _sigterm_kept():
            context = join(address)
    else:
        port = choose_dashboard_port(dashboard_port)
        with _sigterm_kept():
            context = _start_local(port)
    try:
        yield _dashboard_line(context.dashboard_url)
    finally:
        ray.shutdown()


def choose_dashboard_port(wanted: int | str) -> int | None:
    """The wanted port; UsageError if it is taken. None for `auto`: Ray tries from 8265 up, one after another.

    Two runs that start together would find the same port free; only who binds it knows.
    """
    if wanted == "auto":
        return None
    port = int(wanted)
    if not port_is_free(port):
        raise UsageError(
            f"cluster.dashboard_port={port} is taken by another program on this machine. Choose another port, "
            "or leave cluster.dashboard_port=auto."
        )
    return port


_QUIET = {
    "DS_ACCELERATOR": "cpu",  # of this process, which only imports it; every actor is told its own
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
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


def join(address: str, seconds: float = JOIN_SECONDS) -> Any:
    """The cluster that RAY_ADDRESS names; UsageError if none answers in time, where Ray itself would wait minutes."""
    try:
        if not address.startswith(_ASKED_BY_RAY) and os.environ.get("RAY_USE_TLS", "0") == "0":
            _wait_for_answer(address, seconds)
        return ray.init(runtime_env=_environment(), log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, TimeoutError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UsageError(
            f"RAY_ADDRESS={address} names no Ray cluster that can be joined: {reason}. Give HOST:PORT of a running one "
            "(`ray start --head` prints it, its port is 6379 by default), or unset RAY_ADDRESS for a local cluster."
        ) from error


_ASKED_BY_RAY = ("auto", "local", "ray://", "http://", "https://")  # answered, or refused, at once or with a deadline


def _wait_for_answer(address: str, seconds: float) -> None:
    """TimeoutError unless a gRPC server, which Ray's head is, answers there; a port that is only open is none."""
    import grpc

    channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])  # as Ray has it
    try:
        grpc.channel_ready_future(channel).result(timeout=seconds)
    except grpc.FutureTimeoutError:
        raise TimeoutError(f"nobody answered within {seconds:g} s") from None
    finally:
        channel.close()


def _start_local(port: int | None) -> Any:
    try:
        return ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
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


def _dashboard_line(url: str | None) -> str:
    if not url:
        return "no Ray dashboard"
    where = "on loopback; " if url.startswith(("127.", "localhost:")) else ""
    return f"Ray dashboard: http://{url} ({where}it asks for a token, which `ray get-auth-token` prints)"
