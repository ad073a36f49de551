"""Whether a dataset's gold answers can be scored, asked of the rewards before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from configs.errors import RunError
from configs.schema import Rewards
from data.errors import DatasetError
from data.golds import CheckGold
from data.presets import PRESETS
from rewards.gold_check import SlowGoldsError
from rewards.gold_check import gold_check as check_of
from rewards.registry import Gold, gold_kind

# Of (kind, time limit, gold): reading one takes milliseconds, and a run asks twice.
_FAULTS: dict[tuple[Gold, float, str], str] = {}


@contextmanager
def gold_check(rewards: Rewards, dataset: str) -> Iterator[CheckGold]:
    """Within, the check of one dataset's golds, of the kind that the rewards ask for.

    Raises DatasetError for a preset of unit tests where none is asked for, and the reverse, and where many golds take
    too long to read; RunError if what reads them cannot be started.
    """
    kind = gold_kind(rewards.weights)
    if dataset in PRESETS and (PRESETS[dataset].kind == "code") != (kind == "code"):
        tests = PRESETS[dataset].kind == "code"
        raise DatasetError(
            f"The gold answers of {dataset} are {'unit tests' if tests else 'no unit tests'}, and rewards.weights "
            f"names {', '.join(rewards.weights)}. {'Name only code' if tests else 'Leave code out'} there, or choose "
            "another dataset."
        )
    try:
        with check_of(kind, rewards.timeout_seconds, rewards.memory_mb) as check:

            def known(gold: str) -> None:
                key = kind, rewards.timeout_seconds, gold
                if key not in _FAULTS:
                    _FAULTS[key] = _fault(check, gold)
                if fault := _FAULTS[key]:
                    raise ValueError(fault)

            yield known
    except SlowGoldsError as error:
        raise DatasetError(f"The dataset {dataset}: {error}") from error


def _fault(check: CheckGold, gold: str) -> str:
    """What the judge says against a gold answer, if anything."""
    try:
        check(gold)
    except ValueError as error:
        return str(error)
    except RuntimeError as error:  # no child can be started
        raise RunError(str(error)) from error
    return ""
