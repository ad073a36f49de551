"""The killable child process that judges completions, and the class that owns it.

Model text is hostile: sympy can be made to compute for ever or to eat all memory. So judging runs in
a child with a wall-clock limit per completion, an address-space limit, no core files and no files to
write; parent and child speak JSON lines over pipes, never pickle. Rewards are weighed here in the parent, from
the judgement, for lost completions too.

The child never outlives its parent for long: idle, it ends when its input closes; busy, the kernel's
alarm ends it shortly after the limit. (PR_SET_PDEATHSIG would be wrong: it fires when the *thread*
that forked ends, and Ray calls actors from threads that come and go.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import psutil

from rewards import accuracy, exact_match
from rewards.registry import Case, Gold, Judgement, Score, Tags, check_weights, gold_kind, weigh

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 1.0  # the child ends itself this long after the parent should have killed it
MIB = 1024 * 1024


BATCH = 32  # cases sent ahead of their replies, so that neither process waits for the other
Take = Callable[[dict[str, Any]], bool]


class ChildDiedError(Exception):
    """The child closed its pipes instead of answering, or somebody stopped it."""


class VerifierChild:
    """Owns the child: starts it, restarts it when lost, kills it at the deadline.

    timeout_seconds: wall clock for one completion. memory_mb: the child's address space in MiB.
    start_seconds: wall clock for importing sympy in a fresh child. Safe to call from any thread.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        timeout_seconds: float = 5.0,
        memory_mb: int = 2048,
        start_seconds: float = 60.0,
    ) -> None:
        check_weights(weights)
        self.weights = dict(weights)
        self.kind = gold_kind(weights)
        self.timeout_seconds = timeout_seconds
        self.memory_mb = memory_mb
        self.start_seconds = start_seconds
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()

    @property
    def pid(self) -> int | None:
        """Process id of the running child; None if there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def score(self, cases: Sequence[Case]) -> list[Score]:
        """Scores in the order of `cases`. RuntimeError if no child can be started.

        A completion over the time limit gets outcome "timeout". One whose child dies or is stopped is judged
        again in a fresh child, for that may have come from outside; if that one dies too, "error".
        """
        with self._lock:
            judged = self._judge(cases)
        return [weigh(case, judgement, self.weights) for case, judgement in zip(cases, judged, strict=True)]

    def start(self) -> None:
        """Start the child and wait until it is ready to judge; nothing if it runs already."""
        with self._lock:
            if self.pid is not None:
                return
            self._kill()  # reaps one that died while idle
            with tempfile.TemporaryFile() as errors:
                self._process = self._spawn(errors)
                self.starts += 1
                try:
                    self._exchange(b"", 1, self.start_seconds, lambda reply: reply == {"ready": True})
                except (ChildDiedError, TimeoutError) as reason:
                    raise RuntimeError(self._no_start(reason, errors)) from None

    def close(self) -> None:
        """Kill the child and reap it. The next `score` starts a new one."""
        with self._lock:
            self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """Judgements in the order of `cases`, which are sent many at a time and answered one by one."""
        judged: list[Judgement] = []
        deaths = 0  # on the case that is next

        def take(reply: dict[str, Any]) -> bool:
            nonlocal deaths
            judged.append(Judgement(reply["outcome"], reply["extracted"], reply["marked"]))
            deaths = 0
            if reply["retire"]:
                self._kill()
            return not reply["retire"]

        while len(judged) < len(cases):
            self.start()
            batch = cases[len(judged) : len(judged) + BATCH]
            try:
                self._exchange(b"".join(map(_request, batch)), len(batch), self.timeout_seconds, take)
            except TimeoutError:
                judged.append(Judgement("timeout", None))
                deaths = 0
            except ChildDiedError:
                deaths += 1
                if deaths == 2:
                    judged.append(Judgement("error", None))
                    deaths = 0
        return judged

    def _spawn(self, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        # No credentials of the parent's environment reach the process that reads hostile text.
        passed = ("PATH", "LD_LIBRARY_PATH", "POCKETGRPO_")
        kept = {name: value for name, value in os.environ.items() if name.startswith(passed)}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rewards.child", self.kind, str(self.timeout_seconds), str(self.memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            cwd="/",
            env={**kept, "PYTHONPATH": str(PACKAGE_ROOT), "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        for pipe in _pipes(process):
            os.set_blocking(pipe.fileno(), False)
        return process

    def _exchange(self, request: bytes, count: int, seconds: float, take: Take) -> None:
        """Send lines, and give each of `count` replies to `take` until it says no; `seconds` for each reply.

        TimeoutError or ChildDiedError; the child is then gone.
        """
        try:
            self._talk(request, count, seconds, take)
        except BaseException:  # even Ctrl-C: a late reply must never be taken for the next completion's
            self._kill()
            raise

    def _talk(self, request: bytes, count: int, seconds: float, take: Take) -> None:
        assert self._process is not None
        inlet, outlet = (pipe.fileno() for pipe in _pipes(self._process))
        deadline = time.monotonic() + seconds
        unsent, received = memoryview(request), b""
        pipes = select.poll()  # not select(), which fails on descriptors above 1023
        pipes.register(outlet, select.POLLIN)
        if unsent:
            pipes.register(inlet, select.POLLOUT)
        while count:
            ready = dict(pipes.poll(max(deadline - time.monotonic(), 0.0) * 1000))
            if not ready or time.monotonic() > deadline:
                if psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED:
                    raise ChildDiedError("it was stopped")
                raise TimeoutError(f"it gave no answer in {seconds:g} s")
            if outlet in ready:
                chunk = os.read(outlet, 65536)
                if not chunk:
                    raise ChildDiedError("it died")
                *lines, received = (received + chunk).split(b"\n")
                for line in lines:
                    count -= 1
                    if not take(json.loads(line)):
                        return
                    deadline = time.monotonic() + seconds
            if inlet in ready:
                try:
                    unsent = unsent[os.write(inlet, unsent) :]
                except BrokenPipeError:
                    raise ChildDiedError("it died") from None
                if not unsent:
                    pipes.unregister(inlet)

    def _no_start(self, reason: Exception, errors: IO[bytes]) -> str:
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().rpartition("\n")[2][-300:]
        return (
            f"the verifier's child did not start: expected it ready in {self.start_seconds:g} s and "
            f"{self.memory_mb} MiB of address space, but {reason}; its last words: "
            f"{said or '(none)'}. Raise rewards.memory_mb, or free the CPU, and start again"
        )

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(timeout=10)  # SIGKILL takes milliseconds, unless the kernel itself is stuck
        for pipe in _pipes(process):
            pipe.close()


def _request(case: Case) -> bytes:
    """A case as a line; the judgement looks at no more of it."""
    tags = (case.tags.reasoning, case.tags.answer)
    return json.dumps([case.completion, case.gold, tags]).encode("ascii") + b"\n"


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """The child's input and output; Popen types them as optional."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def serve(kind: Gold, timeout_seconds: float, memory_mb: int) -> None:
    """The child: read a case a line, answer with its outcome a line, until the input closes."""
    requests, replies = _take_pipes()
    _limit(memory_mb)
    judge = accuracy.judge if kind == "math" else exact_match.judge
    judge(Case(r"\boxed{1 + x}", "$x + 1$"))  # imports math-verify and builds the LaTeX parser's tables
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _reply(replies, {"ready": True})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    retire_at = (_address_space() + memory_mb * MIB) / 2
    for line in requests:
        completion, gold, tags = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds + GRACE_SECONDS)
        try:
            judgement = judge(Case(completion, gold, Tags(*tags)))
        except Exception:  # noqa: BLE001 - hostile text can trip anything in sympy; errors are counted
            judgement = Judgement("error", None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # sympy's caches grow, and math-verify takes a MemoryError for "not equal": leave in good time
        retire = _address_space() > retire_at
        _reply(replies, {**dataclasses.asdict(judgement), "retire": retire})


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The two pipes, moved away from stdin and stdout so that no library can speak on them."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return requests, replies


def _limit(memory_mb: int) -> None:
    """Address space and core files; Ctrl-C is the parent's affair; the alarm ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * MIB, memory_mb * MIB))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def _address_space() -> int:
    """This process's address space in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _reply(replies: IO[bytes], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode("ascii") + b"\n")
    replies.flush()


if __name__ == "__main__":
    serve(cast(Gold, sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
