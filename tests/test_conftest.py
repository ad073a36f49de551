"""Claims about tests/conftest.py: whatever is left behind fails a run, and long tests wait to be asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import EXEC_SECONDS, marked

CONFTEST = Path(__file__).resolve().parent / "conftest.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CONFTEST.parent.parent), "POCKETGRPO_TEST_GRACE_SECONDS": "0.3"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("pass", None),
        ("subprocess.run(['sh', '-c', 'setsid sleep 3.25 >/dev/null 2>&1 &'], check=True)", "sleep 3.25"),
        (
            "multiprocessing.get_context('fork').Process(target=time.sleep, args=(3,), daemon=True).start()",
            "process",
        ),
        ("open('/dev/shm/pocketgrpo-planted', 'w').close()", "shared memory /dev/shm/pocketgrpo-planted"),
    ],
    ids=["nothing", "orphaned daemon", "forked child", "shared memory"],
)
def test_a_run_that_leaves_something_behind_fails(tmp_path: Path, body: str, said: str | None) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    imports = "import multiprocessing, subprocess, time"
    (tmp_path / "test_planted.py").write_text(f"{imports}\n\ndef test_planted():\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    try:
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    finally:
        Path("/dev/shm/pocketgrpo-planted").unlink(missing_ok=True)
    assert "1 passed" in done.stdout
    assert done.returncode == (0 if said is None else 1), done.stdout
    assert said is None or said in done.stdout.partition("left behind by the tests")[2]


def test_a_process_that_is_just_replacing_its_program_is_found(tmp_path: Path) -> None:
    script = tmp_path / "again.sh"  # nothing but replacing: about one look in twenty meets it without an environment
    script.write_text('exec /bin/sh "$0"\n')
    with subprocess.Popen(["/bin/sh", str(script)], env={**os.environ, "PLANTED": tmp_path.name}) as again:
        try:
            found = [again.pid in [process.pid for process in marked("PLANTED", tmp_path.name)] for _ in range(200)]
        finally:
            again.kill()
    assert all(found), f"missed {found.count(False)} times in {len(found)}"


def test_a_process_that_was_given_no_environment_is_waited_for_once_only() -> None:
    with subprocess.Popen(["sleep", "60"], env={}) as bare:
        try:
            seconds = []
            for _ in range(4):
                start = time.monotonic()
                assert bare.pid not in [process.pid for process in marked("PLANTED", "anything")]
                seconds.append(time.monotonic() - start)
        finally:
            bare.kill()
    assert seconds[0] > EXEC_SECONDS > 2 * min(seconds[1:]), "another such process may begin meanwhile"


@pytest.mark.parametrize("arguments", [[], ["-m", "faults"], ["-m", "long"]], ids=["plain", "-m faults", "-m long"])
def test_long_tests_run_only_when_asked_for(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    short = "@pytest.mark.faults\ndef test_short(): pass\n\n"
    planted = f"import pytest\n\n{short}@pytest.mark.long\n@pytest.mark.faults\ndef test_long(): pass\n"
    (tmp_path / "test_planted.py").write_text(planted)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path), *arguments]
    said = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True).stdout
    assert "1 passed, 1 deselected" in said
    assert ("test_long PASSED" in said) == ("long" in arguments)
