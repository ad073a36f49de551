"""The resumable sampler: hands out prompts in an order that the run's seed and a cursor fix, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data.errors import DatasetError
from data.hashing import stable_hash
from data.records import Prompt


class PromptSampler:
    """Every epoch is a permutation of the prompts, drawn from (seed, epoch).

    `cursor` counts the prompts handed out since the run began and is the whole state: a sampler
    built from the same prompts and seed with that cursor continues where this one stands.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, cursor: int = 0) -> None:
        if not prompts:
            raise DatasetError(
                "No prompt is left to train on: every one was dropped or held out. Raise data.max_prompt_tokens, "
                "lower data.held_out_problems, or give a larger data.dataset."
            )
        if cursor < 0:
            raise ValueError(f"cursor must be 0 or more, got {cursor}")
        self.cursor = cursor
        self._prompts = tuple(prompts)
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    @property
    def epoch(self) -> int:
        """How many times all prompts have been handed out."""
        return self.cursor // len(self._prompts)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, each with its visit number; an epoch may end among them."""
        taken = [self._at(visit) for visit in range(self.cursor, self.cursor + count)]
        self.cursor += count
        return taken

    def _at(self, visit: int) -> Prompt:
        epoch, place = divmod(visit, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return replace(self._prompts[self._order[place]], visit=visit)

    def _permutation(self, epoch: int) -> list[int]:
        """By sorting hashes rather than by a library's shuffle, whose stream may change with its version."""
        places = range(len(self._prompts))
        return sorted(places, key=lambda place: stable_hash("order", self._seed, epoch, place))


def completion_seed(run_seed: int, visit: int, index: int) -> int:
    """The seed of completion `index` of the prompt with number `visit`, in [0, 2**63).

    63 bits of a 64-bit blake2b hash: vLLM's server, Parquet's and numpy's int64 take no more.
    torch's CPU generator looks at the low 32 bits alone, so there two completions of a long run may
    share a random stream; within one group of 64 the chance is 5e-7.
    """
    return stable_hash("completion", run_seed, visit, index) >> 1
