"""Claims about the sandbox: hostile programs are contained and scored as what they are, and nothing is left of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rewards.code import check_gold
from rewards.judges import open_judge
from rewards.registry import Case
from rewards.sandbox import _START, PACKAGE, Sandbox, Walls

TESTS = "assert double(2) == 4"
GOOD = "def double(x):\n    return 2 * x\n"
PASS = "\ndef double(x):\n    return 4\n"


@pytest.fixture(scope="module", params=["namespaces", "bubblewrap"])
def walls(request: pytest.FixtureRequest) -> Walls:
    if request.param == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    return request.param


def behind(walls: Walls, seconds: float = 10.0, memory_mb: int = 512) -> Sandbox:
    """A sandbox behind these walls, tried first."""
    sandbox = Sandbox(seconds, memory_mb)
    sandbox.walls = walls
    if sandbox.run(GOOD, TESTS) == "error":
        pytest.skip(f"this system refuses {walls}")
    return sandbox


@pytest.fixture(scope="module")
def sandbox(walls: Walls) -> Sandbox:
    return behind(walls)


@pytest.fixture(scope="module")
def hasty(walls: Walls) -> Sandbox:
    return behind(walls, seconds=1.5)


def processes_left() -> list[psutil.Process]:
    """What still runs of any sandbox of this checkout."""
    left = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "rewards.unit_tests" in command and (str(PACKAGE) in command or command.endswith(" /rewards")):
            left.append(process)
    return left


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while processes_left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_left() == []


# -- what is judged ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        (GOOD, "correct"),
        ("import math, json, re, itertools, collections, datetime, random, decimal" + PASS, "correct"),
        ("def double(x):\n    return x", "wrong"),
        ("def other(x):\n    return 4", "wrong"),
        ("def double(x)\n    return 4", "wrong"),
        ("raise ValueError" + PASS, "wrong"),
        ("\ud800 \x00", "wrong"),
        ("(" * 5000, "wrong"),
        ("import ctypes; ctypes.string_at(0)" + PASS, "wrong"),
        ("if __name__ == '__main__':\n    input()" + PASS, "correct"),
    ],
)
def test_a_program_is_correct_if_it_passes_its_tests_and_wrong_if_not(sandbox, program, outcome):
    assert sandbox.run(program, TESTS) == outcome


# -- what is contained -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import time; time.sleep(1000)",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\nwhile True:\n    pass",
        "import os\nos.setsid() if os.fork() == 0 else None\nwhile True:\n    pass",
    ],
    ids=["loop", "sleep", "stubborn fork bomb", "deaf loop", "daemon"],
)
def test_what_does_not_end_is_a_timeout(hasty, program):
    start = time.monotonic()
    assert hasty.run(program, TESTS) == "timeout"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True:\n    os.fork()",
        "import threading\nwhile True:\n    threading.Thread(target=threading.Event().wait).start()",
        "held = bytearray(10 * 2**30)",
        "import os\nheld = []\nfor _ in range(10):\n    os.fork() or held.append(b'x' * (200 * 2**20))\n"
        "    if held:\n        import time; time.sleep(1000)\nimport time; time.sleep(1000)",
    ],
    ids=["fork bomb", "thread bomb", "10 GB", "2 GB in ten processes"],
)
def test_what_takes_too_much_is_wrong(sandbox, program):
    assert sandbox.run(program + PASS, TESTS) == "wrong"


def test_a_gigabyte_on_stdout_goes_nowhere(sandbox):
    program = "import sys\nfor _ in range(1000):\n    print('x' * 10**6)\n    sys.stderr.write('x' * 10**5)" + PASS
    assert sandbox.run(program, TESTS) == "correct"


def test_nothing_can_be_written_but_a_little_in_its_own_folder(sandbox, tmp_path):
    tmp_path.chmod(0o777)
    places = ["/x", "/etc/x", "/usr/lib/x", "/dev/x", "/dev/shm/x", "/proc/sys/kernel/hostname", f"{sys.base_prefix}/x"]
    ours = tmp_path / "x"
    program = f"""
import os
def written():
    done = []
    for place in {[*places, str(ours)]!r}:
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(place, "w") as file:
                file.write("x")
            if not place.startswith("/tmp/"):
                done.append(place)
        except OSError:
            pass
    return done
def filled():
    size = 0
    for number in range(1000):
        try:
            with open(f"/tmp/{{number}}", "wb") as file:
                size += file.write(bytes(2**20))
        except OSError:
            break
    return size
"""
    tests = "assert written() == []\nassert 2**20 <= filled() <= 65 * 2**20\nassert os.getcwd() == '/tmp'"
    assert sandbox.run(program, tests) == "correct"
    assert not ours.exists(), "its /tmp is not ours"
    assert sandbox.run("import os" + PASS, "assert os.listdir('/tmp') == []") == "correct", "of the run before"


def test_no_link_leads_out(sandbox, tmp_path):
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o666)
    program = f"""
import os
def reached():
    done = []
    targets = ("/", "/..", "/proc/1/root", "/proc/1/cwd", "/proc/self/root", "/proc/self/root/..")
    for number, target in enumerate(targets):
        link = f"/tmp/link{{number}}"
        os.symlink(target, link)
        for path in (link + {str(secret)!r}, link + "/../../../../.." + {str(secret)!r}):
            for mode in ("r", "w"):
                try:
                    open(path, mode).close()
                    done.append((path, mode))
                except OSError:
                    pass
    for name in ("link", "rename", "symlink"):
        try:
            getattr(os, name)({str(secret)!r}, "/tmp/" + name)
            done += [name] if os.path.exists("/tmp/" + name) else []
        except OSError:
            pass
    for number in range(256):
        try:
            os.fchdir(number)
            done.append(number)
        except OSError:
            pass
    return done
"""
    assert sandbox.run(program, "assert reached() == [] and os.path.isdir('/tmp/link0/usr')") == "correct"
    assert secret.read_text() == "hunter2"


def test_the_network_is_out_of_reach(sandbox):
    name = f"\0pocketgrpo-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(name)
        unix.listen()
        program = f"""
import socket
def reached():
    done = []
    for family, address in (("AF_INET", {tcp.getsockname()!r}), ("AF_UNIX", {name!r}), ("AF_INET", ("192.0.2.1", 80))):
        with socket.socket(getattr(socket, family)) as client:
            client.settimeout(2)
            try:
                client.connect(address)
                done.append(address)
            except OSError:
                pass
    return done
"""
        assert sandbox.run(program, "assert reached() == []") == "correct"
        with socket.create_connection(tcp.getsockname(), timeout=2):
            pass  # it did listen


def test_other_processes_and_the_environment_are_out_of_sight(sandbox, monkeypatch):
    monkeypatch.setenv("POCKETGRPO_SECRET", "hunter2")
    program = """
import glob, os
def seen():
    text = repr(dict(os.environ))
    for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/mountinfo"):
        try:
            text += open(path, errors="replace").read()
        except OSError:
            pass
    return text
def processes():
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}
def first():
    done = []
    for path in ("/proc/1/environ", "/proc/1/mem", "/proc/1/fd/1"):
        try:
            open(path, "rb+").close()
            done.append(path)
        except OSError:
            pass
    return done
"""
    tests = "assert 'hunter2' not in seen()\nassert processes() == {1, os.getpid()}\nassert first() == []"
    assert sandbox.run(program, tests) == "correct"
    homes = f"assert not any(os.path.exists(p) for p in ({str(Path(__file__))!r}, '/home', '/etc/passwd', '/var'))"
    assert sandbox.run("import os" + PASS, homes) == "correct"


def test_it_has_no_rights_and_can_gain_none(sandbox):
    program = """
import ctypes, os
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
def value(key):
    return int(status[key].split()[0], 16)
def gained():
    libc = ctypes.CDLL(None)
    return libc.unshare(1 << 28) == 0 or libc.unshare(1 << 17) == 0 or libc.mount(b"x", b"/tmp", b"tmpfs", 0, None) == 0
"""
    tests = "assert os.getuid() != 0\nassert value('CapEff') == value('CapPrm') == 0\nassert value('NoNewPrivs') == 1\n"
    assert sandbox.run(program, tests + "assert not gained()") == "correct"


def test_it_cannot_kill_its_guard_nor_us(sandbox):
    kills = "".join(
        f"\ntry:\n    os.kill({target}, 9)\nexcept OSError:\n    pass" for target in ("1", "os.getppid()", "-1")
    )
    assert sandbox.run(f"import os{kills}{PASS}", TESTS) == "correct"
    assert sandbox.run(f"import os{kills}\nos.kill(0, 9){PASS}", TESTS) == "wrong"


FAKES = {
    "print": "print('passed')\nprint('{\"outcome\": \"correct\"}')",
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "exit later": "import os\ndef double(x):\n    os._exit(0)",
    "raise SystemExit": "def double(x):\n    raise SystemExit(0)",
    "every descriptor": "import os\nfor fd in range(256):\n    try:\n        os.write(fd, b'{\"outcome\": 1}')\n"
    "    except OSError:\n        pass\nos._exit(0)",
    "another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
    "patched builtins": "import builtins\nbuiltins.all = lambda _: True\nbuiltins.AssertionError = ValueError\n"
    "builtins.exec = builtins.compile = lambda *_: None",
    "patched os": "import os\nos._exit = lambda code: None\nos.write = lambda *_: 0",
    "profile": "import sys\nsys.setprofile(lambda *_: (_ for _ in ()).throw(SystemExit(0)))",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "fork and leave": "import os\nif os.fork():\n    os._exit(0)",
}


@pytest.mark.parametrize("name", FAKES)
def test_a_verdict_cannot_be_faked(sandbox, name):
    assert sandbox.run(FAKES[name], TESTS + "\nassert all([double(2) == 4, double(3) == 6])") == "wrong"


def test_a_process_left_behind_ends_with_the_run(sandbox):
    start = time.monotonic()
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n" + GOOD
    assert sandbox.run(program, TESTS) == "correct"
    assert time.monotonic() - start < 8


# -- who starts it -----------------------------------------------------------------------------------


def test_an_ordinary_user_has_the_same_walls(tmp_path):
    """As the user nobody, whose namespaces are a user namespace's, with a Python that nobody may run."""
    python = "/usr/bin/python3"
    if os.getuid() != 0 or not os.access(python, os.X_OK):
        pytest.skip("needs root, to become another user, and a system Python")
    for name in ("unit_tests.py", "isolation.py"):
        shutil.copy(PACKAGE / name, tmp_path)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)

    def outcome(program: str, tests: str, walls: Walls = "namespaces") -> str:
        case = {"walls": walls, "code": program, "tests": tests, "seconds": 5, "memory_mb": 512}
        command = [python, "-I", "-S", "-c", _START, str(tmp_path)]
        done = subprocess.run(
            command, input=json.dumps(case), text=True, capture_output=True, user=65534, group=65534, extra_groups=[]
        )
        answer = json.loads(done.stdout)
        if "refused" in answer:
            pytest.skip(f"this system lets users make no namespaces: {answer['refused']}")
        return answer["outcome"]

    alone = "import os" + PASS
    assert outcome(GOOD, TESTS) == "correct"
    assert outcome(alone, "assert os.getuid() == 65534 and len([p for p in os.listdir('/proc') if p.isdigit()]) == 2")
    assert outcome("import os\nwhile True:\n    os.fork()", TESTS) == "wrong"
    assert outcome("open('/proc/1/fd/1', 'w')" + PASS, TESTS) == "wrong", "process 1 is closed to its own user"
    assert outcome("open('/proc/1/environ').read()" + PASS, TESTS) == "wrong"
    guard = "import os\nopen(f'/proc/{os.getppid()}/environ').read()" + PASS
    assert outcome(guard, TESTS, "none") == "wrong", "the guard is closed to its own user by itself, walls or not"
    assert outcome("open('/x', 'w')" + PASS, TESTS) == outcome("open('/dev/x', 'w')" + PASS, TESTS) == "wrong"


REFUSED = """
import sys
from rewards.sandbox import Sandbox
sandbox = Sandbox(5.0, 512, unsafe=sys.argv[1] == "unsafe")
try:
    sandbox.start()
    outcomes = [sandbox.run(program, "assert f() == 1") for program in ("def f(): return 1", "while True: pass")]
    print(sandbox.walls, *outcomes)
except RuntimeError as error:
    print(error)
"""


def without_capabilities(mode: str) -> str:
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to take the right to make namespaces away")
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", REFUSED, mode]
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_where_namespaces_are_refused_code_does_not_run_and_the_message_says_what_to_do():
    said = without_capabilities("safe")
    assert "unshare: Operation not permitted" in said
    assert "Install bubblewrap" in said and "rewards.unsafe_code=true" in said


def test_unsafe_code_runs_without_walls_but_not_for_ever():
    assert without_capabilities("unsafe") == "none correct timeout"


# -- from completion to verdict ----------------------------------------------------------------------


def test_the_code_reward_takes_the_last_python_block_and_the_gold_answers_tests(walls):
    behind(walls)
    fenced = "<think>```python\nbad\n```</think>\n<answer>So:\n```python\n{}```\n```\nnot python\n```\n</answer>"
    texts = [
        fenced.format(GOOD),
        f"<answer>{GOOD}</answer>",
        f"```py\n{GOOD}\n```",
        f"```\n{GOOD}\n```",
        "```python\n" + GOOD + "```\nor better\n```python\ndef double(x): return x\n```",
        "it is 4",
        f"<think>\n```python\n{GOOD}```",
        "```python\nimport os; os._exit(0)\n```",
    ]
    judge = open_judge({"code": 2.0, "format": 0.5}, timeout_seconds=10, memory_mb=512)
    judge.start()
    scores = judge.score([Case(text, TESTS) for text in texts])
    judge.close()
    expected = ["correct"] * 4 + ["wrong", "unparsable", "unparsable", "wrong"]
    assert [score.outcome for score in scores] == expected
    assert scores[0].rewards == {"code": 1.0, "format": 1.0} and scores[0].total == 2.5
    assert scores[0].extracted == GOOD.rstrip("\n") and scores[0].marked
    assert judge.score([Case(texts[0], "no tests")])[0].outcome == "error"


@pytest.mark.parametrize(
    ("gold", "fault"),
    [
        ("assert double(2) ==", "no Python program"),
        ("double(2)", "asserts nothing"),
        ("", "asserts nothing"),
        ("def check(f):\n    assert f(2) == 4", "asserts nothing"),
        ("\x00", "no Python program"),
    ],
)
def test_a_gold_that_tests_nothing_is_refused(gold, fault):
    with pytest.raises(ValueError, match=fault):
        check_gold(gold)


@pytest.mark.parametrize(
    "gold",
    [TESTS, "def check(f):\n    assert f(2) == 4\ncheck(double)", "for n in range(3):\n    assert double(n) == 2 * n"],
)
def test_golds_that_assert_something_when_they_run_are_taken(gold):
    assert check_gold(gold) == gold
