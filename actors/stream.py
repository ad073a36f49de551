"""Sampling that goes on while the learner works: groups in the order of their visits, out of a bounded buffer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from actors.crew import OPTION
from actors.sampling import Flight, Sampled
from actors.waiting import Deadline, late
from configs.errors import RunError
from data.records import Group
from data.sampler import PromptSampler

TICK_SECONDS = 0.02  # how soon a place that has become free is filled
CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class StreamOptions:
    """max_staleness: weight pushes by which a group's oldest token may be behind. last_visit: where sampling ends
    (None: nowhere). deadline_seconds: longest wait for a group."""

    max_staleness: int
    prompts_per_batch: int
    last_visit: int | None
    deadline_seconds: float


class SampleStream:
    """Samples and verifies ahead of the learner, in a thread of its own that starts with the first `take`.

    A prompt is admitted as long as fewer than (1 + max_staleness) batches of them are held: under way,
    waiting here, or being trained on. Groups leave in the order of their visits, and give their places
    free when the weights they led to have been pushed; so at most max_staleness batches are trained
    between a prompt's admission and its own training. What is too old all the same is dropped and counted.

    pushed: the newest versions that the workers had, theirs last. buffered: groups that had finished when the run
    was interrupted, which are not sampled again. What the thread raises, `take` raises.
    """

    def __init__(
        self,
        flight: Flight,
        sampler: PromptSampler,
        pushed: Sequence[int],
        options: StreamOptions,
        buffered: Sequence[Group] = (),
    ) -> None:
        self.cursor = sampler.cursor  # the next visit to hand out, from which a resumed run samples again
        self._flight, self._sampler, self._options = flight, sampler, options
        self._held = 0
        self._taken = 0  # of those held: handed out since the last push
        self._sampled: set[int] = set()  # the visits being sampled or judged
        self._finished = {group.prompt.visit: group for group in buffered}
        self._pushed = deque(pushed, maxlen=1 + options.max_staleness)
        self._admitting, self._closed = True, False
        self._busy_seconds = 0.0
        self._failure: BaseException | None = None
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sample stream", daemon=True)

    def take(self, count: int) -> Sampled:
        """The next `count` groups that are not too old, once they have their verdicts. RunError after a deadline.

        Its sample_seconds are those in which prompts were under way since the last call, whoever waited.
        """
        if not self._thread.ident:
            self._thread.start()
        deadline = Deadline(self._options.deadline_seconds)
        groups: list[Group] = []
        dropped = 0
        with self._news:
            while len(groups) < count:
                self._wait_until(lambda: self.cursor in self._finished, "sampling ahead", deadline)
                group = self._finished.pop(self.cursor)
                self.cursor += 1
                if oldest_version(group) < self._pushed[0]:
                    dropped += 1
                    self._held -= 1
                else:
                    groups.append(group)
                    self._taken += 1
            busy, self._busy_seconds = self._busy_seconds, 0.0
        return Sampled(groups, busy, 0.0, dropped)

    def discard(self, count: int) -> None:
        """So many of the groups taken will not be trained on: their places are free for others."""
        with self._news:
            self._taken -= count
            self._held -= count
            self._news.notify_all()

    def pushed(self, version: int) -> None:
        """The workers sample with these weights now: what was taken before gives its places free."""
        with self._news:
            self._pushed.append(version)
            self._held -= self._taken
            self._taken = 0
            self._news.notify_all()

    def balance(self) -> tuple[int, int]:
        """Prompts handed out, and how many of them are being sampled or judged, or wait for `take`."""
        with self._news:
            waiting = sum(visit < self._sampler.cursor for visit in self._finished)
            return self._sampler.cursor, len(self._sampled) + waiting

    def ahead(self) -> tuple[tuple[int, ...], list[Group]]:
        """What a checkpoint keeps: the versions in `pushed`, and the groups that wait, in visit order."""
        with self._news:
            return tuple(self._pushed), [self._finished[visit] for visit in sorted(self._finished)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is under way and the workers are free for something else; what has finished is kept."""
        with self._news:
            self._admitting = False
            deadline = Deadline(self._options.deadline_seconds)
            self._wait_until(lambda: not self._flight.under_way, "ending", deadline)
        try:
            yield
        finally:
            with self._news:
                self._admitting = True
                self._news.notify_all()

    def close(self) -> None:
        """Stop admitting and listening; what the workers still sample ends with them."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        if self._thread.ident:
            self._thread.join(CLOSE_SECONDS)  # a worker that is gone may hold it longer; it ends with the process

    def _wait_until(self, done: Callable[[], bool], doing: str, deadline: Deadline) -> None:
        """Wait for it with the lock held."""
        while not done():
            if self._failure is not None:
                raise self._failure
            if not self._news.wait(deadline.left) and not deadline.left:
                raise RunError(late(f"A rollout worker ({doing})", deadline.seconds, OPTION))

    # -- the stream's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._admit()
                self._collect()
        except BaseException as error:  # noqa: BLE001 - the thread's last act: `take` raises it
            with self._news:
                self._failure = error
                self._news.notify_all()

    def _room(self) -> int:
        """Prompts that may be admitted now."""
        options = self._options
        room = (1 + options.max_staleness) * options.prompts_per_batch - self._held
        if options.last_visit is not None:
            room = min(room, options.last_visit - self._sampler.cursor)
        return max(0, room) if self._admitting else 0

    def _admit(self) -> None:
        with self._news:
            if room := self._room():
                self._held += room
                prompts = [p for p in self._sampler.take(room) if p.visit not in self._finished]
                self._sampled.update(prompt.visit for prompt in prompts)
                self._news.notify_all()  # whoever waits for one that had finished before
                self._flight.submit(prompts)
            elif not self._flight.under_way and not self._closed:
                self._news.wait(1.0)

    def _collect(self) -> None:
        """Until groups have finished or others may be admitted."""
        deadline, last = Deadline(self._options.deadline_seconds), time.monotonic()
        while self._flight.under_way and not self._closed:
            groups = self._flight.wait(deadline, TICK_SECONDS)
            with self._news:
                now = time.monotonic()
                self._busy_seconds += now - last
                last = now
                for group in groups:
                    self._sampled.remove(group.prompt.visit)
                    self._finished[group.prompt.visit] = group
                if groups:
                    self._news.notify_all()
                if groups or self._room():
                    return


def oldest_version(group: Group) -> int:
    """The policy version of the group's oldest token."""
    return min(int(completion.versions.min()) for completion in group.completions)
