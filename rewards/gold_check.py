"""Whether gold answers can be scored, found out before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rewards import accuracy, code, exact_match
from rewards.child import VerifierChild
from rewards.registry import Case, Gold

GoldCheck = Callable[[str], object]
MAX_SLOW = 20  # so many gold answers over the time limit are an attack or a mistake, and no reason to wait for more


class SlowGoldsError(Exception):
    """Too many gold answers are over the time limit; the message names the last."""


@contextmanager
def gold_check(kind: Gold, timeout_seconds: float = 5.0, memory_mb: int = 2048) -> Iterator[GoldCheck]:
    """Within, what refuses by a ValueError that names it a gold answer of this kind that could not be scored.

    Mathematics that is no plain number is read where it will be judged, in a child that can be killed: a dataset is
    as hostile as a model. timeout_seconds: wall clock of one gold answer. memory_mb: address space, in MiB, of what
    reads it. SlowGoldsError at the 20th that is over the time limit; RuntimeError if no child can be started.
    """
    if kind == "math":
        with VerifierChild({"accuracy": 1.0}, timeout_seconds, memory_mb) as child:
            yield _Reader(child)
    else:
        yield {"exact": exact_match.check_gold, "code": code.check_gold}[kind]


class _Reader:
    """Has a child, which is started for the first gold answer that is no plain number, read mathematics."""

    def __init__(self, child: VerifierChild) -> None:
        self._child, self._slow = child, 0

    def __call__(self, gold: str) -> None:
        if accuracy.is_plain(gold):
            return
        outcome = self._child.score([Case("", gold)])[0].outcome
        if outcome == "timeout":
            self._slow += 1
            message = accuracy.refusal(gold, f"takes more than {self._child.timeout_seconds:g} s to parse")
            if self._slow == MAX_SLOW:
                raise SlowGoldsError(f"{MAX_SLOW} gold answers take too long, the last: {message}")
            raise ValueError(message)
        if outcome == "error":
            raise ValueError(accuracy.refusal(gold))
