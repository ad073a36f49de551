"""Actors that do the same work, each in a place of its own. Whoever is lost is replaced there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import ray
from ray.actor import ActorHandle

from actors.restarts import Restarts
from actors.waiting import ActorLost, ask, wait_for
from configs.errors import RunError

OPTION = "cluster.deadline_seconds"


class Crew:
    """The living actors of one kind, in the order of their places.

    kind: what they are called in messages. start: begins an actor for a place, without waiting for it; without it
    nobody is replaced. check_needed: called before anybody is; raises where that would be in vain.
    """

    def __init__(
        self,
        kind: str,
        actors: list[ActorHandle],
        deadline_seconds: float,
        start: Callable[[int], ActorHandle] | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        self.kind, self.actors, self.deadline_seconds = kind, actors, deadline_seconds
        self.lock = threading.RLock()  # held while someone is replaced, and by whoever needs all of them alive
        self.check_needed: Callable[[], None] = lambda: None
        self._start, self._restarts = start, restarts
        self._starting: Collection[ActorHandle] = ()
        self._closed = False

    def ready(self) -> list[ActorHandle]:
        """Those that have come up."""
        return [actor for actor in list(self.actors) if actor not in self._starting]

    def replace(self, lost: Collection[ActorHandle], why: str) -> bool:
        """Put new actors, ready to work, in the places of these; False if others have done so already.

        RunError if nobody may be replaced any more.
        """
        with self.lock:
            places = [place for place, actor in enumerate(self.actors) if actor in lost]
            if not places:
                return False
            while True:
                if self._start is None or self._restarts is None or self._closed:
                    raise RunError(why)
                self.check_needed()
                self._restarts.allow(self._name(places), why)
                for place in places:
                    ray.kill(self.actors[place])
                new = {place: self._start(place) for place in places}
                self._starting = set(new.values())
                for place, actor in new.items():
                    self.actors[place] = actor
                try:
                    self._wait_until_ready(new.values())
                except ActorLost as error:
                    why = str(error)
                    continue
                return True

    def close(self) -> None:
        """From now on nobody is replaced."""
        self._closed = True

    def _wait_until_ready(self, actors: Collection[ActorHandle]) -> None:
        references = [ask(actor.ready) for actor in actors]
        wait_for(references, self.deadline_seconds, f"A {self.kind} (starting again)", OPTION)
        self._starting = set()

    def _name(self, places: list[int]) -> str:
        return f"{self.kind.capitalize()} {', '.join(str(place) for place in places)}"
