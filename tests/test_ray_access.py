"""Claims about who may use a Ray cluster: its own user, by token; nobody joins one unawares, and no refusal hangs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from cluster import ray_access
from cluster.ray_session import _dashboard_line
from configs.errors import UsageError
from tests.ray_head import Head, clean_environment, ray_head, run
from tests.running_cluster import _free_ports
from tests.small_run import SMALL

RIGHT, WRONG = "0123456789abcdef" * 4, "fedcba9876543210" * 4
READ = ("/api/version", "/api/jobs/", "/nodes?view=summary", "/api/v0/tasks", "/api/cluster_status")
SECONDS = 15.0  # of a refusal, on a machine that does much else; Ray alone takes 20 s of retries


@pytest.fixture(scope="module")
def guarded() -> Iterator[Head]:
    with ray_head(RIGHT) as head:
        yield head


@pytest.fixture(scope="module")
def open_to_all() -> Iterator[Head]:
    with ray_head(None) as head:
        yield head


def asked(url: str, token: str | None, job: bool = False) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    if job:
        return requests.post(url, json={"entrypoint": "true"}, headers=headers, timeout=60).status_code
    return requests.get(url, headers=headers, timeout=60).status_code


@pytest.mark.parametrize(("token", "status"), [(None, 401), (WRONG, 403), (RIGHT, 200)], ids=["none", "wrong", "right"])
def test_the_dashboard_and_the_jobs_api_answer_the_token_alone(guarded: Head, token: str | None, status: int) -> None:
    assert {asked(guarded.dashboard + path, token) for path in READ} == {status}
    assert asked(f"{guarded.dashboard}/api/jobs/", token, job=True) == status


def test_a_cluster_that_is_open_answers_anybody(open_to_all: Head) -> None:
    assert asked(f"{open_to_all.dashboard}/api/jobs/", None) == 200, "else the test above proves nothing"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "asks for a token, and this driver shows none"),
        ({"RAY_AUTH_MODE": "token"}, "asks for a token, and this driver shows none"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG}, "has another token than this driver"),
    ],
    ids=["nothing", "mode alone", "wrong"],
)
def test_a_driver_without_the_token_is_told_what_to_do_in_seconds(
    guarded: Head, variables: dict[str, str], said: str
) -> None:
    start = time.monotonic()
    done = guarded.joined(**variables)
    assert time.monotonic() - start < SECONDS
    assert done.returncode == 1 and f"UsageError: The Ray cluster at {guarded.address} {said}" in done.stderr
    assert "ray get-auth-token" in done.stderr and "RAY_AUTH_TOKEN" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, "nothing of Ray's between the lines"


def test_the_command_refuses_with_code_2(guarded: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.train", "--config", str(SMALL), f"training.runs_dir={tmp_path}/runs"]
    done = run(command, clean_environment(guarded.home) | {"RAY_ADDRESS": guarded.address})
    assert done.returncode == 2 and "error: The Ray cluster at" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_driver_with_the_token_joins_and_is_told_that_it_is_asked_for(guarded: Head) -> None:
    done = guarded.joined(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=RIGHT)
    assert done.returncode == 0, done.stderr
    assert "it asks for a token, which `ray get-auth-token` prints" in done.stdout and "warning" not in done.stdout
    assert done.stdout.strip().endswith("| 1")


@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RIGHT}], ids=["none", "ours"])
def test_a_driver_that_joins_an_open_cluster_says_so_in_one_line(open_to_all: Head, variables: dict[str, str]) -> None:
    done = open_to_all.joined(**variables)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    assert "warning: this cluster asks for no token, so whoever reaches it may run anything on it" in line
    assert "asks for a token" not in line


def test_an_address_where_nobody_is_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_access, "KNOCK_SECONDS", 1.0)
    (port,) = _free_ports(1)
    with pytest.raises(UsageError, match=rf"No Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:{port} within 1 s"):
        ray_access.check_token(f"127.0.0.1:{port}")


LOCAL = """
import os, requests
from pathlib import Path
from cluster.ray_session import ray_session
with ray_session("auto") as line:
    print(line)
    url = line.split()[2] + "/api/jobs/"
    token = Path.home() / ".ray" / "auth_token"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer " + token.read_text()}):
        print(requests.get(url, headers=headers, timeout=60).status_code, end=" ")
    print(oct(token.stat().st_mode & 0o777))
"""


def test_a_local_cluster_asks_for_a_token_that_its_user_alone_can_read(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", LOCAL], clean_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    line, found = done.stdout.strip().splitlines()
    assert "(on loopback; it asks for a token, which `ray get-auth-token` prints)" in line
    assert found == "401 403 200 0o600"
    assert [path.name for path in (tmp_path / ".ray").iterdir()] == ["auth_token"]


def test_a_token_that_was_switched_off_is_a_warning() -> None:
    line = _dashboard_line("127.0.0.1:8265", asks=False)
    assert "on loopback" in line and "warning: this cluster asks for no token" in line
