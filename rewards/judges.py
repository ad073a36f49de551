"""The judges, one for each kind of gold answer: mathematics and texts in a killable child, code in the sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rewards import code
from rewards.child import VerifierChild
from rewards.registry import Case, Judgement, Score, check_weights, gold_kind, weigh
from rewards.sandbox import Sandbox


class Judge(Protocol):
    """Scores completions, whatever their text; nothing of its own is left running after `close`."""

    def start(self) -> None:
        """Be ready to judge; RuntimeError, saying what to do, if that cannot be."""

    def score(self, cases: Sequence[Case]) -> list[Score]:
        """Scores in the order of `cases`. RewardError if a user's own reward fails."""

    def close(self) -> None: ...


def open_judge(
    weights: Mapping[str, float], timeout_seconds: float = 5.0, memory_mb: int = 2048, unsafe_code: bool = False
) -> Judge:
    """The judge of the kind of gold answers that the weights ask for, not yet started. ValueError as `check_weights`.

    timeout_seconds: wall clock of one completion. memory_mb: address space, in MiB, of what judges it.
    """
    check_weights(weights)
    if gold_kind(weights) == "code":
        return CodeJudge(weights, Sandbox(timeout_seconds, memory_mb, unsafe_code))
    return VerifierChild(weights, timeout_seconds, memory_mb)


class CodeJudge:
    """Judges programs by unit tests, each completion in a sandbox of its own."""

    def __init__(self, weights: Mapping[str, float], sandbox: Sandbox) -> None:
        self._weights, self._sandbox = dict(weights), sandbox

    def start(self) -> None:
        self._sandbox.start()

    def score(self, cases: Sequence[Case]) -> list[Score]:
        return [weigh(case, self._judge(case), self._weights) for case in cases]

    def close(self) -> None:
        """Nothing runs between two completions."""

    def _judge(self, case: Case) -> Judgement:
        try:
            return code.judge(case, self._sandbox)
        except ValueError:  # the gold answer is no unit test; the data loader refuses such rows
            return Judgement("error", None)
