"""Faults planted in a learner rank, which the comparison with the plain step must see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

import learner.objectives
import learner.rank
import learner.resharding
import learner.trainer_state
from learner.batching import MicroBatch, kept, micro_batches, token_weights
from learner.objectives import LossInputs, LossOptions, k3, total_loss
from learner.partitions import Partition, partitions
from learner.policy import Policy
from learner.rank import LearnerRank
from learner.step_gate import StepGate


def planted(name: str | None) -> AbstractContextManager[Any]:
    """The named fault, planted while the context lasts; none for None."""
    return contextlib.nullcontext() if name is None else MUTANTS[name]


# -- micro-batches and ranks ----------------------------------------------------------------------


def _normalised_per_micro_batch(*arguments: Any, **options: Any) -> list[MicroBatch]:
    batches = micro_batches(*arguments, **options)
    count = len(batches) * options["ranks"]
    return [replace(b, weights=b.weights / b.weights.sum() / count if b.weights.any() else b.weights) for b in batches]


def _averaged_over_ranks(self: LearnerRank, batch: MicroBatch) -> Any:
    loss, *others = _right_loss(self, batch)
    return loss / self.options.ranks, *others


_right_loss = LearnerRank._loss


# -- the forward ----------------------------------------------------------------------------------


def _without_temperature(self: LearnerRank, module: Any, batch: MicroBatch) -> Any:
    sampled_from = replace(self._sampled_from, temperature=1.0)
    return module(batch.input_ids, batch.position_ids, batch.rows, batch.columns, batch.targets, sampled_from)


def _positions_that_go_on(*arguments: Any, **options: Any) -> list[MicroBatch]:
    batches = micro_batches(*arguments, **options)
    return [replace(b, position_ids=torch.arange(b.input_ids.shape[1]).expand_as(b.input_ids)) for b in batches]


def _forward_with(**options: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    """`Policy.forward` with more arguments to the decoder, made from the input ids."""

    def forward(self: Policy, input_ids: Any, position_ids: Any, rows: Any, columns: Any, *others: Any) -> Any:
        more = {"use_cache": False} | {name: make(input_ids) for name, make in options.items()}
        decoder = self.model.get_decoder()
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, **more).last_hidden_state
        return self.log_prob_head(hidden[rows, columns], *others)

    return forward


# -- the loss -------------------------------------------------------------------------------------


def _loss_with(change: Callable[[LossOptions], LossOptions]) -> Callable[[LossInputs, LossOptions], Any]:
    return lambda inputs, options: total_loss(inputs, change(options))


# -- filtering ------------------------------------------------------------------------------------


def _weights_of_survivors(sequences: Sequence[Any], *options: Any) -> list[float]:
    """The right weights of what is left, as if what is filtered had never been there."""
    survivors = [i for i, s in enumerate(sequences) if s.advantage != 0.0]
    weights = dict(zip(survivors, token_weights([sequences[i] for i in survivors], *options), strict=True))
    return [weights.get(i, 1.0) for i in range(len(sequences))]


def _keeping_one(sequences: Sequence[Any], weights: Sequence[float], threshold: float | None) -> list[int]:
    return kept(sequences, weights, threshold) or [0]


# -- checkpoints ----------------------------------------------------------------------------------


def _shifted_by_one(engine: Any) -> list[Partition]:
    return [
        Partition(numel, tuple(s._replace(offset=max(0, s.offset - 1)) for s in slices))
        for numel, slices in partitions(engine)
    ]


MUTANTS: dict[str, AbstractContextManager[Any]] = {
    "loss normalised per micro-batch": patch.object(learner.rank, "micro_batches", _normalised_per_micro_batch),
    "gradient averaged over ranks": patch.object(LearnerRank, "_loss", _averaged_over_ranks),
    "temperature left out": patch.object(LearnerRank, "_forward", _without_temperature),
    "positions that go on in a packed row": patch.object(learner.rank, "micro_batches", _positions_that_go_on),
    "mask of ones": patch.object(Policy, "forward", _forward_with(attention_mask=torch.ones_like)),
    "cache in use": patch.object(Policy, "forward", _forward_with(use_cache=lambda _: None)),
    "clip bounds swapped": patch.object(
        learner.rank, "total_loss", _loss_with(lambda o: replace(o, clip_low=o.clip_high, clip_high=o.clip_low))
    ),
    "KL with the wrong sign": patch.object(
        learner.rank, "total_loss", _loss_with(lambda o: replace(o, kl_coefficient=-o.kl_coefficient))
    ),
    "KL the wrong way round": patch.dict(
        learner.objectives.KL_ESTIMATORS, k3=lambda own, reference: k3(reference, own)
    ),
    "no importance correction": patch.object(
        learner.rank, "total_loss", _loss_with(lambda o: replace(o, importance_correction="off"))
    ),
    "loss normalised by what is left": patch.object(learner.rank, "token_weights", _weights_of_survivors),
    "a step on nothing": patch.object(learner.rank, "kept", _keeping_one),
    "offsets shifted by one": patch.object(learner.trainer_state, "partitions", _shifted_by_one),
    "moments not put together": patch.object(learner.resharding, "moments_of", lambda keys: []),
    "no waiting for copies": patch.object(LearnerRank, "_wait_for_copies", lambda self: None),
    "a gate left open": patch.object(StepGate, "_pass_on", lambda gate: gate._optimizer_step()),
    "moments lost in sleep": patch.object(LearnerRank, "wake", lambda self: self._engine.basic_optimizer.state.clear()),
}
