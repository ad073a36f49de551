"""Heartbeats: who does not answer one in time is killed, so that whoever waits for it hears that it is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from actors.waiting import ask

CLOSE_SECONDS = 5.0
PATIENCE = 0.8  # of the time between two heartbeats, for an answer; the rest is for the end of who gives none
HEALTH = "health"  # the group of calls that are answered whatever else an actor does


def watched(kind: type) -> Any:
    """A plain class with a `heartbeat`, as Ray's actor class, which answers that beside all other calls."""
    return ray.remote(concurrency_groups={HEALTH: 1})(kind)


Members = Mapping[str, Callable[[], Sequence[ActorHandle]]]


class Heartbeats:
    """Asks every actor for a heartbeat, every `seconds`, in a thread of its own, until `close`.

    A frozen process is found within 1.8 of them, and gone within two, where Ray ends it in the rest of the time. A
    busy one answers, as the call has a thread of its own over there.
    members: by kind, those that are ready now.
    """

    def __init__(self, seconds: float, members: Members, say: Callable[[str], None]) -> None:
        self._seconds, self._members, self._say = seconds, members, say
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        due = time.monotonic() + self._seconds
        while not self._closed.wait(max(0.0, due - time.monotonic())):
            due = time.monotonic() + self._seconds  # also where this one waits for somebody who does not answer
            self._beat()

    def _beat(self) -> None:
        asked = {
            ask(actor.heartbeat.options(concurrency_group=HEALTH)): (f"{kind.capitalize()} {place}", actor)
            for kind, ready in self._members.items()
            for place, actor in enumerate(ready())
        }
        patience = PATIENCE * self._seconds
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=patience)
        for reference in silent:
            self._kill(*asked[reference], f"has not answered for {patience:g} s")
        for reference in answered:
            try:
                ray.get(reference, timeout=self._seconds)
            except RayTaskError as error:
                self._kill(*asked[reference], f"is of no use any more: {error.cause}")
            except RayActorError:
                pass  # whoever waits for it hears of it

    def _kill(self, name: str, actor: ActorHandle, why: str) -> None:
        if not self._closed.is_set():
            self._say(f"{name} {why}: killed")
            ray.kill(actor)
