"""Waiting for Ray actors: every wait has a deadline, and its error names who is waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from configs.errors import RunError, UsageError

WHERE_LOGS_ARE = "Its log is in Ray's session folder, logs/worker-*.err."


class ActorLost(RunError):
    """An actor is of no more use: its process died, or what it hosts failed. Another can take its place."""


def wait_for(
    references: Sequence[ray.ObjectRef], seconds: float, who: str, option: str, lost: type[RunError] = ActorLost
) -> list[Any]:
    """The answers of all references. RunError, naming `who` and the deadline's `option`, if one is late;
    `lost` if its actor has died; an error of ours raised over there is raised here as it was."""
    try:
        answers = ray.get(list(references), timeout=seconds)
    except GetTimeoutError:
        raise RunError(late(who, seconds, option)) from None
    except RayActorError as error:
        raise lost(f"{who} has died: {_cause(error)} {WHERE_LOGS_ARE}") from None
    except ObjectLostError:  # large answers stay with their actor's node until they are fetched
        raise lost(f"{who} has answered, but its node died before the answer was fetched.") from None
    except RayTaskError as error:
        if isinstance(error.cause, RunError | UsageError):
            raise type(error.cause)(*error.cause.args) from None
        raise
    for answer in answers:
        if isinstance(answer, ActorLost):  # of `ask`
            raise lost(f"{who}: {answer}")
    return answers


def ask(method: Any, *arguments: Any) -> ray.ObjectRef:
    """`method.remote(*arguments)`, of an actor's method.

    Ray calls no actor that it has forgotten after its death, and says so by a bare exception; the reference is then
    one for which `wait_for` raises what it raises for the dead.
    """
    try:
        return method.remote(*arguments)
    except Exception as error:  # nothing narrower is raised
        if "Can't find actor" not in str(error):
            raise
        return ray.put(ActorLost(f"it is dead. {WHERE_LOGS_ARE}"))


def late(who: str, seconds: float, option: str) -> str:
    """The message of a deadline missed."""
    return (
        f"{who} did not answer within {seconds:g} s. It hangs or is too slow for its work: look at the Ray "
        f"dashboard, give it less to do, or raise {option}."
    )


def _cause(error: Exception) -> str:
    """Of Ray's many lines what a person needs: the exception that ended an actor's start, else how it died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "creation task" in lines[0] else " ".join(lines[:2])


class Deadline:
    """Time left until a moment `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())
