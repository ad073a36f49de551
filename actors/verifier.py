"""The verifier: gives every completion of a group its verdict. A plain class that Ray hosts."""

from __future__ import annotations

import dataclasses

from configs.errors import RunError
from configs.schema import Rewards
from data.records import Completion, Group, Prompt, Verdict
from rewards.judges import open_judge
from rewards.registry import Case, Length, RewardError, Score, Settings, Tags


class Verifier:
    """Scores groups one after the other, in processes that can be killed. ValueError on an unknown reward."""

    def __init__(self, options: Rewards, max_completion_tokens: int) -> None:
        self._limit, self._buffer = max_completion_tokens, options.overlong_buffer
        self._tags = Tags(options.reasoning_tag, options.answer_tag)
        self._settings = Settings(options.cosine_correct, options.cosine_wrong, options.script)
        self._judge = open_judge(options.weights, options.timeout_seconds, options.memory_mb, options.unsafe_code)

    def ready(self) -> bool:
        """True once the judge works; RunError, saying why, if it cannot be started."""
        try:
            self._judge.start()
        except RuntimeError as error:
            raise RunError(str(error)) from error
        return True

    def score(self, group: Group) -> Group:
        """The group with its verdicts, in the order of its completions.

        Takes at most about twice rewards.timeout_seconds per completion, plus restarts of the child.
        RunError if a user's own reward fails.
        """
        cases = [self._case(each, group.prompt) for each in group.completions]
        try:
            scores = self._judge.score(cases)
        except RewardError as error:
            raise RunError(str(error)) from error
        return dataclasses.replace(group, verdicts=tuple(_verdict(score) for score in scores))

    def _case(self, completion: Completion, prompt: Prompt) -> Case:
        length = Length(len(completion.token_ids), self._limit, self._buffer)
        gold = prompt.problem.answer
        return Case(completion.text, gold, self._tags, length, prompt.prefill, self._settings)

    def heartbeat(self) -> None:
        """Nothing; that it answers is the news."""

    def close(self) -> None:
        """End the judge; nothing is left running."""
        self._judge.close()


def _verdict(score: Score) -> Verdict:
    return Verdict(score.rewards, score.total, score.outcome, score.extracted, score.marked)
