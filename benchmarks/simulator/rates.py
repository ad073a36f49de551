"""Seconds of every piece of a run's work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Seconds of every piece of work, alone on its device. `beside`: the pace a busy neighbour on the CPU leaves."""

    submit: float = 0.0  # a worker's first decode step after it stood idle
    decode: float = 0.0  # a decode step, however few completions run
    running: float = 0.0  # in it, each of them
    context: float = 0.0  # in it, each token that they look back on
    start: float = 0.0  # beginning a completion: its request and its prompt
    hand: float = 0.0  # the driver: a group from worker to verifier and back
    hand_actor: float = 0.0  # in it, each worker that is listened to
    hand_token: float = 0.0  # in it, each token of the group
    verify_group: float = 0.0  # a verifier: a group
    verify: float = 0.0  # in it, each completion
    step: float = 0.0  # the driver: a step's records
    record: float = 0.0  # in them, each completion
    record_token: float = 0.0  # in them, each token
    update: float = 0.0  # an update, however small
    share: float = 0.0  # in it, each completion, on every rank: cutting the batch
    share_square: float = 0.0  # in it, the square of their number
    token: float = 0.0  # in it, each token, prompts among them, shared out among the ranks
    exchange: float = 0.0  # in it, times 2 (ranks - 1) / ranks: gradients between ranks
    probe: float = 0.0  # in it, asynchronous: the check of the last push
    push: float = 0.0  # the weights to the workers
    push_worker: float = 0.0  # in it, each worker but the first
    beside: float = 1.0
