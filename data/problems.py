"""Problems as a run uses them: some are held out and never trained on."""

from __future__ import annotations

from collections.abc import Sequence

from data.errors import DatasetError
from data.hashing import stable_hash
from data.records import Problem


def split_held_out(problems: Sequence[Problem], held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training problems, `held_out` held-out problems), disjoint by id, each in the given order.

    Which questions are held out hangs on (seed, id) alone. Of a question that stands there twice
    either all copies are trained on, or one is held out and the others are left out.
    Raises DatasetError if no training problem would remain.
    """
    first = {problem.id: problem for problem in reversed(problems)}
    if len(first) <= held_out:
        raise DatasetError(
            f"{held_out} problems are to be held out, but there are only {len(first)} different ones, and at least "
            "one must be left to train on. Lower data.held_out_problems or give a larger data.dataset."
        )
    chosen = set(sorted(first, key=lambda identity: (stable_hash("held out", seed, identity), identity))[:held_out])
    train = [problem for problem in problems if problem.id not in chosen]
    kept = [problem for problem in problems if problem.id in chosen and first[problem.id] is problem]
    return train, kept
