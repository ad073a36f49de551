"""The rollout worker: vLLM's engine driven step by step in one thread, control calls between steps.

A plain class; Ray hosts it with several concurrent calls, all of which hand their work to the engine's
thread. That is what lets groups be verified as they finish and weights change while others generate.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from actors.engine import Engine, EngineOptions, Sampling
from data.records import Completion, Group, Prompt
from data.sampler import completion_seed


@dataclass(frozen=True)
class SampleRequest:
    """How to sample prompts: completions per prompt, sampling settings, and the run's seed."""

    completions: int
    sampling: Sampling
    seed: int


@dataclass
class _Pending:
    """A group under way."""

    prompt: Prompt
    size: int
    completions: list[Completion] = field(default_factory=list)


class RolloutWorker:
    """Samples groups. `submit` queues prompts, `take` hands out groups as they finish."""

    def __init__(self, options: EngineOptions, register_transport: Callable[[], None], version: int = 0) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._finished: deque[Group] = deque()
        self._news = threading.Condition()
        self._failure: BaseException | None = None
        self._pending: dict[int, _Pending] = {}
        self._owner: dict[str, int] = {}
        self._probes: dict[str, tuple[Prompt, Future[Group]]] = {}
        self._submitted = 0
        self._changing = False
        self._engine: Engine | None = None
        self._thread = threading.Thread(
            target=self._run, args=(options, register_transport, version), name="engine", daemon=True
        )
        self._thread.start()

    # -- called from outside, by any thread -----------------------------------------------------------

    def ready(self) -> int:
        """The process id, once the engine is up; raises what kept it from coming up."""
        self._between_steps(lambda: None)
        return os.getpid()

    def submit(self, prompts: list[Prompt], request: SampleRequest) -> None:
        """Queue the completions of these prompts."""
        self._between_steps(lambda: self._add(prompts, request))

    def take(self, wait_seconds: float) -> list[Group]:
        """The groups that have finished since the last call; waits for one, at most `wait_seconds`."""
        with self._news:
            self._news.wait_for(lambda: self._finished or self._failure, timeout=wait_seconds)
            if self._failure is not None:
                raise self._failure
            groups = list(self._finished)
            self._finished.clear()
            return groups

    def weight_transfer(self, call: str, arguments: dict[str, Any]) -> None:
        """One call of vLLM's weight-transfer interface, between two decode steps.

        finish_weight_update also takes `version`, the policy version of what is sampled from then on.
        """
        self._between_steps(lambda: self._transfer(call, dict(arguments)))

    def probe(self, prompt: Prompt, request: SampleRequest) -> Group:
        """A group of one completion with the weights that are in use now, beside whatever else is under way."""
        answer: Future[Group] = Future()
        self._between_steps(lambda: self._add_probe(prompt, request, answer))
        return answer.result()

    def cached_tokens(self) -> int:
        """Prompt tokens answered from the prefix cache so far."""
        return self._between_steps(lambda: self._the_engine.cached_tokens)

    def _between_steps(self, job: Callable[[], Any]) -> Any:
        """Run `job` in the engine's thread between two decode steps; returns or raises what it does."""
        answer: Future[Any] = Future()
        self._jobs.put((job, answer))
        if self._failure is not None:  # the engine's thread is gone and will answer nobody
            raise self._failure
        return answer.result()

    # -- the engine's thread --------------------------------------------------------------------------

    @property
    def _the_engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _run(self, options: EngineOptions, register_transport: Callable[[], None], version: int) -> None:
        try:
            self._engine = Engine(options, register_transport)
            self._engine.version = version
            while True:
                self._do_jobs()
                if self._engine.busy:
                    self._decode()
        except BaseException as error:  # noqa: BLE001 - the thread's last act: whoever waits must hear of it
            self._fail(error)

    def _do_jobs(self) -> None:
        """Everything that waits between steps; with nothing to decode, wait for the next job."""
        while not self._jobs.empty() or not self._the_engine.busy or self._changing:
            job, answer = self._jobs.get()
            try:
                answer.set_result(job())
            except Exception as error:  # noqa: BLE001 - belongs to the caller, who raises it
                answer.set_exception(error)

    def _decode(self) -> None:
        for request_id, completion in self._the_engine.step():
            if request_id in self._probes:
                prompt, answer = self._probes.pop(request_id)
                answer.set_result(Group(prompt, (completion,)))
                continue
            pending = self._pending[self._owner.pop(request_id)]
            pending.completions.append(completion)
            if len(pending.completions) == pending.size:
                self._finish(pending)

    def _finish(self, pending: _Pending) -> None:
        del self._pending[pending.prompt.visit]
        in_order = tuple(sorted(pending.completions, key=lambda c: c.index))
        with self._news:
            self._finished.append(Group(pending.prompt, in_order))
            self._news.notify_all()

    def _add(self, prompts: list[Prompt], request: SampleRequest) -> None:
        for prompt in prompts:
            if prompt.visit in self._pending:
                raise ValueError(f"prompt {prompt.visit} is already being sampled by this worker")
            self._pending[prompt.visit] = _Pending(prompt, request.completions)
            for index in range(request.completions):
                self._submitted += 1
                request_id = f"{prompt.visit}-{index}-{self._submitted}"
                self._owner[request_id] = prompt.visit
                seed = completion_seed(request.seed, prompt.visit, index)
                self._the_engine.add(request_id, index, list(prompt.token_ids), seed, request.sampling)

    def _add_probe(self, prompt: Prompt, request: SampleRequest, answer: Future[Group]) -> None:
        self._submitted += 1
        request_id = f"probe-{self._submitted}"
        self._probes[request_id] = (prompt, answer)
        seed = completion_seed(request.seed, prompt.visit, 0)
        self._the_engine.add(request_id, 0, list(prompt.token_ids), seed, request.sampling)

    def _transfer(self, call: str, arguments: dict[str, Any]) -> None:
        version = arguments.pop("version", None)
        if call == "start_weight_update":
            self._changing = True  # from here to the finish the weights are of no policy: nothing is decoded
        self._the_engine.weight_transfer(call, **arguments)
        if call == "finish_weight_update":
            self._changing = False
        if version is not None:
            self._the_engine.set_version(version)

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self._failure = error
            self._news.notify_all()
        while not self._jobs.empty():
            self._jobs.get()[1].set_exception(error)
        for _, answer in self._probes.values():
            answer.set_exception(error)
