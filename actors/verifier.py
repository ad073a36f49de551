"""The verifier: gives every completion of a group its verdict. A plain class that Ray hosts."""

from __future__ import annotations

import dataclasses

from configs.schema import Rewards
from data.records import Completion, Group, Verdict
from rewards.child import VerifierChild
from rewards.registry import Case, Length, Score, Tags


class Verifier:
    """Scores groups one after the other, in one killable child. ValueError on an unknown reward."""

    def __init__(self, options: Rewards, max_completion_tokens: int) -> None:
        self._limit, self._buffer = max_completion_tokens, options.overlong_buffer
        self._tags = Tags(options.reasoning_tag, options.answer_tag)
        self._child = VerifierChild(options.weights, options.timeout_seconds, options.memory_mb)

    def ready(self) -> bool:
        """True once the child judges; RuntimeError, saying why, if it cannot be started."""
        self._child.start()
        return True

    def score(self, group: Group) -> Group:
        """The group with its verdicts, in the order of its completions.

        Takes at most about twice rewards.timeout_seconds per completion, plus restarts of the child.
        """
        gold = group.prompt.problem.answer
        scores = self._child.score([self._case(each, gold) for each in group.completions])
        return dataclasses.replace(group, verdicts=tuple(_verdict(score) for score in scores))

    def _case(self, completion: Completion, gold: str) -> Case:
        length = Length(len(completion.token_ids), self._limit, self._buffer)
        return Case(completion.text, gold, self._tags, length=length)

    def close(self) -> None:
        """End the child; nothing is left running."""
        self._child.close()


def _verdict(score: Score) -> Verdict:
    return Verdict(score.rewards, score.total, score.outcome, score.extracted)
