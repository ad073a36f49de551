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
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil

from actors.engine import Engine, EngineOptions, Sampling
from actors.waiting import ActorLost, Deadline
from data.records import Completion, Group, Prompt
from data.sampler import completion_seed

START, FINISH = "start_weight_update", "finish_weight_update"


class HalfLoaded(ActorLost):
    """A weight update that began and did not end; what the worker would sample now comes from no policy."""


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
    """Samples groups. `submit` queues prompts, `take` hands out groups as they finish.

    deadline_seconds: between two calls of one weight update, during which nothing is decoded.
    """

    def __init__(self, options: EngineOptions, deadline_seconds: float, version: int = 0) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._finished: deque[Group] = deque()
        self._news = threading.Condition()
        self._failure: BaseException | None = None
        self._pending: dict[int, _Pending] = {}
        self._owner: dict[str, int] = {}
        self._probes: dict[str, tuple[Prompt, Future[Group]]] = {}
        self._submitted = 0
        self._engine: Engine | None = None
        self._deadline_seconds = deadline_seconds
        self._update: Deadline | None = None  # for the next call, while a weight update is under way
        self._thread = threading.Thread(target=self._run, args=(options, version), name="engine", daemon=True)
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

    def weight_transfer(self, call: str, arguments: dict[str, Any]) -> dict[str, float]:
        """One call of vLLM's weight-transfer interface, between two decode steps; from start_weight_update to
        finish_weight_update there are none.

        finish_weight_update also takes `version`, the policy version of what is sampled from then on, and
        answers with the seconds that the update took here, by part.
        """
        return self._between_steps(lambda: self._transfer(call, dict(arguments)))

    def sleep(self) -> None:
        """Free the GPU's memory for the learner; on a CPU nothing."""
        self._between_steps(lambda: self._the_engine.sleep())

    def wake_up(self, what: Literal["weights", "kv_cache"]) -> None:
        """Weights before a weight update, the cache before sampling."""
        self._between_steps(lambda: self._the_engine.wake_up(what))

    def close(self) -> None:
        """End the processes that share the model."""
        self._between_steps(lambda: self._the_engine.close())

    def probe(self, prompt: Prompt, request: SampleRequest) -> Group:
        """A group of one completion with the weights that are in use now, beside whatever else is under way."""
        answer: Future[Group] = Future()
        self._between_steps(lambda: self._add_probe(prompt, request, answer))
        return answer.result()

    def heartbeat(self) -> None:
        """Nothing, if all is well. ActorLost if the engine has failed, or a process of vLLM's is frozen."""
        if self._failure is not None:
            raise self._failure
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    process.kill()  # frozen, it would outlive us
                    raise ActorLost(f"Process {process.pid} of a rollout worker's engine is frozen (stopped).")

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

    def _run(self, options: EngineOptions, version: int) -> None:
        try:
            self._engine = Engine(options)
            self._engine.version = version
            while True:
                self._do_jobs()
                if self._engine.busy:
                    self._decode()
        except ActorLost as error:
            self._fail(error)
        except BaseException as error:  # noqa: BLE001 - the thread's last act: whoever waits must hear of it
            self._fail(ActorLost(f"vLLM's engine failed in a rollout worker: {type(error).__name__}: {error}"))

    def _do_jobs(self) -> None:
        """Everything that waits between steps; with nothing to decode, or half an update, wait for the next job."""
        while not self._jobs.empty() or not self._the_engine.busy or self._update:
            job, answer = self._next_job()
            try:
                answer.set_result(job())
            except HalfLoaded as error:
                answer.set_exception(error)
                raise
            except Exception as error:  # noqa: BLE001 - belongs to the caller, who raises it
                answer.set_exception(error)

    def _next_job(self) -> tuple[Callable[[], Any], Future[Any]]:
        try:
            return self._jobs.get(timeout=self._update.left if self._update else None)
        except queue.Empty:
            raise HalfLoaded(
                f"A weight update began and {self._deadline_seconds:g} s after its last call has not gone on, so the "
                "rollout worker has half-loaded weights. Its sender, learner rank 0, has died or hangs: look at the "
                "Ray dashboard, or raise cluster.deadline_seconds."
            ) from None

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

    def _transfer(self, call: str, arguments: dict[str, Any]) -> dict[str, float]:
        version = arguments.pop("version", None)
        if call == START or self._update:
            self._update = Deadline(self._deadline_seconds)
        try:
            self._the_engine.weight_transfer(call, **arguments)
        except Exception as error:  # whatever it was, half an update must not be decoded with
            if not self._update:
                raise
            raise HalfLoaded(f"A weight update failed half way in a rollout worker ({call}): {error}") from error
        if call != FINISH:
            return {}
        self._the_engine.set_version(version)
        self._update = None
        return self._the_engine.update_seconds()

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self._failure = error
            self._news.notify_all()
        while not self._jobs.empty():
            self._jobs.get()[1].set_exception(error)
        for _, answer in self._probes.values():
            answer.set_exception(error)
