"""Claims about tests/conftest.py: leftovers fail a run, and long tests wait until they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parent / "conftest.py"


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
    environment = {**os.environ, "POCKETGRPO_TEST_GRACE_SECONDS": "0.3"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    finally:
        Path("/dev/shm/pocketgrpo-planted").unlink(missing_ok=True)
    assert "1 passed" in done.stdout
    assert done.returncode == (0 if said is None else 1), done.stdout
    assert said is None or said in done.stdout.partition("left behind by the tests")[2]


@pytest.mark.parametrize("arguments", [[], ["-m", "faults"], ["-m", "long"]], ids=["plain", "-m faults", "-m long"])
def test_long_tests_run_only_when_asked_for(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    short = "@pytest.mark.faults\ndef test_short(): pass\n\n"
    planted = f"import pytest\n\n{short}@pytest.mark.long\n@pytest.mark.faults\ndef test_long(): pass\n"
    (tmp_path / "test_planted.py").write_text(planted)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path), *arguments]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "1 passed, 1 deselected" in said
    assert ("test_long PASSED" in said) == ("long" in arguments)
