"""One learner rank: a DeepSpeed engine that turns update batches into new weights.

A plain class: `cluster` makes a Ray actor of it, `replay` and the
tests use it as it is. Every method is a collective: all ranks are called alike, in the same order.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from configs.schema import Config
from learner import resharding, trainer_state
from learner.alarms import NO_LIMITS, Alarms, Limits
from learner.batching import MicroBatch, Sequence, kept, micro_batches, token_weights
from learner.checkpoint_writer import BackgroundWriter, FileFacts, described, flush_to_disk, write_model
from learner.collectives import from_rank_0, max_over_ranks, sum_over_ranks
from learner.deepspeed_engine import build_engine, join_process_group
from learner.lora import FOLDER
from learner.memory_copies import MemoryCopies
from learner.objectives import OBJECTIVES, LossInputs, loss_options, total_loss
from learner.offload import OptimizerOffload
from learner.policy import Policy, SampledFrom, load_policy
from learner.push_check import check_logprobs
from learner.schedule import learning_rate
from learner.step_gate import StepGate
from learner.whole_weights import WholeWeights

Tensors = dict[str, torch.Tensor]

TRAINER = "trainer"  # the folder of every rank's state in a checkpoint


class Sender(Protocol):
    """What `sync_weights` needs of a weight transport. Every rank makes every call."""

    def open(self, weights: WholeWeights) -> None: ...

    def send(self, version: int) -> dict[str, float]: ...


@dataclass(frozen=True)
class RankOptions:
    """Where this rank stands and what it loads.

    reference_path: the reference policy, for the KL; with LoRA, the base under the adapters, and
    model_path is then the same or a checkpoint. total_updates: optimizer steps of the whole run.
    """

    rank: int
    ranks: int
    address: str
    port: int
    threads: int
    model_path: Path
    reference_path: Path
    total_updates: int


class LearnerRank:
    """Holds the policy, its optimizer, and how many optimizer steps it has made (`version`)."""

    def __init__(self, config: Config, options: RankOptions) -> None:
        torch.set_num_threads(options.threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":  # bitwise claims are for the CPU
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.config = config
        self.options = options
        self.version = 0
        deadline = config.cluster.deadline_seconds
        join_process_group(options.rank, options.ranks, options.address, options.port, deadline)
        self._engine = build_engine(config, options.model_path, options.reference_path)
        self._gate = StepGate(self._engine)
        self._policy: Policy = self._engine.module
        self._offload = OptimizerOffload(self._engine, self._device)
        # Read now: a checkpoint that the run was resumed from is deleted in time.
        self._tokenizer = AutoTokenizer.from_pretrained(options.model_path, trust_remote_code=False)
        self._loss_options = loss_options(config.learner)
        rollout = config.rollout
        self._sampled_from = SampledFrom(rollout.temperature, rollout.top_k, rollout.top_p)
        if config.learner.supervised:  # demonstrations were not sampled: the likelihood is the model's own
            self._sampled_from = SampledFrom()
        self._reference = self._load_reference(options.reference_path) if config.learner.needs_reference else None
        self._sender: Sender | None = None
        self._weights = WholeWeights(self._policy, config.learner.zero_stage, options.rank, deadline)
        self._writer: BackgroundWriter[dict[str, FileFacts]] = BackgroundWriter()
        self._copies = MemoryCopies()
        self._copied = threading.Event()  # clear as long as a checkpoint has yet to be copied from the live state
        self._copied.set()
        self._waited = 0.0  # seconds for such copies since the last step

    def ready(self) -> int:
        """The process id, once the constructor is through."""
        return os.getpid()

    def heartbeat(self) -> None:
        """Nothing; that it answers is the news."""

    # -- learning ---------------------------------------------------------------------------------

    def update(self, sequences: ListOf[Sequence], on_policy: bool, limits: Limits = NO_LIMITS) -> dict[str, float]:
        """One optimizer step on an update batch; returns its metrics, the same on every rank but for seconds.

        on_policy: the sequences were sampled with just these weights, so the sampler's log-probs must
        equal ours. If filtering leaves nothing, or a guard skips the batch, there is no step: version and
        learning rate stand still. RunError, before the weights change, from a guard that stops the run.
        """
        weights = self._token_weights(sequences)
        indices = kept(sequences, weights, self.config.learner.filter_threshold)
        counts = {"policy/filtered": 1.0 - len(indices) / len(sequences), "policy/updates": float(bool(indices))}
        if not indices:
            return counts
        rate = learning_rate(self.config.learner, self.version, self.options.total_updates)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        totals = self._accumulate(self._micro_batches(sequences, weights, indices))
        alarms = Alarms(self.config.training.guards)
        self._check(alarms, totals, on_policy, limits)
        self._wait_for_copies()
        waited, self._waited = self._waited, 0.0
        grad_norm = self._gate.step(alarms.highest_norm(limits))
        self._check_grad_norm(alarms, grad_norm, limits)
        counts["policy/updates"] = float(not alarms.skip)
        if not alarms.skip:
            self.version += 1
        tokens = totals["tokens"]
        return counts | {
            "policy/loss": totals["loss"],
            "policy/entropy": totals["entropy"] / tokens,
            "policy/clip_fraction": totals["clipped"] / tokens,
            "policy/importance_cut": totals.get("importance_cut", 0.0) / tokens,
            "policy/kl": totals.get("kl", 0.0) / tokens,
            "policy/grad_norm": grad_norm,
            "policy/learning_rate": rate,
            "rollout/logprob_diff": totals["diff"] / tokens,
            "rollout/logprob_diff_max": totals["diff_max"],
            "tokens/trained": tokens,
            "time/checkpoint_wait": waited,
            **alarms.metrics,
        }

    def _token_weights(self, sequences: ListOf[Sequence]) -> list[float]:
        learner = self.config.learner
        denominator = OBJECTIVES[learner.objective].denominator
        constant = self.config.rollout.max_completion_tokens if denominator == "constant" else learner.tokens_per_update
        return token_weights(sequences, denominator, float(constant or 0), learner.mask_truncated)

    def _accumulate(self, batches: ListOf[MicroBatch]) -> dict[str, float]:
        """Forward and backward of every micro-batch; the sums of its statistics over all ranks."""
        sums: dict[str, float] = {}
        worst = 0.0
        for batch in batches:
            loss, statistics, diff_max = self._loss(batch)
            # DeepSpeed averages gradients over ranks; the weights already add up over all of them.
            self._engine.backward(loss * self.options.ranks, scale_wrt_gas=False)
            for name, value in statistics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            worst = max(worst, diff_max)
        return {**sum_over_ranks(sums), "diff_max": max_over_ranks(worst)}

    def _loss(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, Any], float]:
        reference_logprobs = self._reference_logprobs(batch)  # first: nothing may come between forward and backward
        logprobs, entropies = self._forward(self._engine, batch)
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs,
            sampler_logprobs=batch.sampler_logprobs,
            reference_logprobs=reference_logprobs,
            entropies=entropies,
            advantages=batch.advantages,
            weights=batch.weights,
            sequence=batch.sequence,
        )
        loss, statistics = total_loss(inputs, self._loss_options)
        real = batch.sequence >= 0
        diff = (logprobs.detach() - batch.sampler_logprobs).abs()[real]
        statistics |= {
            "loss": loss.detach(),
            "entropy": entropies.detach()[real].sum(),
            "diff": diff.sum(),
            "tokens": real.sum(),
        }
        return loss, statistics, float(diff.max()) if len(diff) else 0.0

    def _reference_logprobs(self, batch: MicroBatch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with torch.no_grad(), self._policy.adapters.disabled():
            return self._forward(self._reference, batch)[0]

    def _check(self, alarms: Alarms, totals: dict[str, float], on_policy: bool, limits: Limits) -> None:
        """Raise alarms on a loss that is no number, a policy that explores no more, weights that did not arrive."""
        if not math.isfinite(totals["loss"]):
            alarms.raised(
                "nan",
                f"The loss of policy version {self.version} is {totals['loss']}. Lower learner.learning_rate "
                "or learner.max_grad_norm, or use model.dtype=float32; the newest checkpoint is untouched.",
            )
        entropy = totals["entropy"] / totals["tokens"]
        if entropy < limits.entropy:
            alarms.raised(
                "entropy",
                f"The entropy of policy version {self.version} collapsed to {entropy:.2e} nats a token, expected at "
                f"least {limits.entropy:.2e} after the steps before. Go back to a checkpoint and raise "
                "rollout.temperature, learner.clip_high or learner.entropy_coefficient, or lower "
                "learner.learning_rate.",
            )
        if on_policy:
            limit = self.config.rollout.logprob_diff
            check_logprobs(alarms, totals["diff"] / totals["tokens"], totals["diff_max"], limit, self.version)

    def _check_grad_norm(self, alarms: Alarms, norm: float, limits: Limits) -> None:
        """Raise alarms on a gradient that is no number, with which no step was made, or out of line."""
        if not math.isfinite(norm):
            alarms.raised(
                "nan",
                f"The gradient of policy version {self.version} overflowed: it is no number, and no step was made. "
                "Lower learner.learning_rate or look at the rewards; the newest checkpoint is untouched.",
            )
        elif norm > limits.grad_norm:
            alarms.raised(
                "grad_norm",
                f"The gradient of policy version {self.version} has the norm {norm:.3g}, expected up to "
                f"{limits.grad_norm:.3g} after the steps before. Look at the rollouts of this step, lower "
                "learner.learning_rate, or allow it with training.guards.grad_norm=warn.",
            )

    def logprobs(self, sequences: ListOf[Sequence]) -> list[tuple[int, np.ndarray]]:
        """(index, log-probs float32 [C]) of this rank's share of what will be trained on, without gradient."""
        weights = self._token_weights(sequences)
        indices = kept(sequences, weights, self.config.learner.filter_threshold)
        answers = []
        with torch.no_grad():
            for batch in self._micro_batches(sequences, weights, indices):
                values, _ = self._forward(self._engine, batch)
                for index in torch.unique(batch.sequence[batch.sequence >= 0]).tolist():
                    answers.append((index, values[batch.sequence == index].cpu().numpy()))
        return answers

    def reset_reference(self, folder: Path) -> None:
        """Write the policy to `folder`, make it the reference and, if asked for, forget the optimizer's moments."""
        self._wait_for_copies()
        weights = self.whole_weights()
        if self.options.rank == 0:
            self._write_model(folder, weights)
            flush_to_disk(folder)
        from_rank_0(None)  # the others read what rank 0 has written
        self._reference = self._load_reference(folder)
        if self.config.learner.reset_optimizer:
            self._engine.basic_optimizer.state.clear()

    def _micro_batches(
        self, sequences: ListOf[Sequence], weights: ListOf[float], indices: ListOf[int]
    ) -> list[MicroBatch]:
        learner = self.config.learner
        batches = micro_batches(
            sequences,
            weights,
            indices,
            budget=learner.tokens_per_micro_batch,
            packing=learner.packing,
            rank=self.options.rank,
            ranks=self.options.ranks,
        )
        return [batch.to(self._device) for batch in batches]

    def _forward(self, module: Any, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return module(batch.input_ids, batch.position_ids, batch.rows, batch.columns, batch.targets, self._sampled_from)

    def _load_reference(self, path: Path) -> Any:
        """A forward-only copy; with LoRA none is loaded, as the policy under disabled adapters is the reference."""
        if self._policy.adapters:
            return self._engine
        model, chunk = self.config.model, self.config.learner.logprob_chunk_tokens
        policy = load_policy(path, model.dtype, chunk, gradient_checkpointing=False, device=self._device.type)
        return policy.requires_grad_(False).to(self._device)

    def sleep(self) -> None:
        """Give the optimizer's memory on the GPU to whoever shares it; `wake` takes it back."""
        self._wait_for_copies()
        self._offload.sleep()

    def wake(self) -> None:
        self._wait_for_copies()
        self._offload.wake()

    # -- weights out ------------------------------------------------------------------------------

    def connect(self, sender: Sender) -> None:
        """Take the transport that `sync_weights` will use."""
        sender.open(self._weights)
        self._sender = sender

    def sync_weights(self) -> dict[str, float]:
        """Push the weights to every rollout worker, as the current version; on rank 0, seconds of the parts of it."""
        if self._sender is None:
            raise RuntimeError("sync_weights before connect")
        return self._sender.send(self.version)

    # -- checkpoints ------------------------------------------------------------------------------

    def whole_weights(self) -> Tensors:
        """A copy of the whole model on rank 0; empty on the others, which take part in the gather."""
        return self._weights.copies()

    def begin_save(self, folder: Path) -> None:
        """Save this rank's state in the background: trainer state of every rank, and from rank 0 the model as a
        Hugging Face folder. First it is copied in memory, which whatever changes it waits for, and then written.
        """
        self._writer.done(wait=True)  # whose copies lie where these will
        self._copied.clear()

        def write() -> dict[str, FileFacts]:
            try:
                try:
                    weights = self._weights.copies(self._copies.copy)
                    adapters = self._weights.adapter_copies()
                    tensors, facts = trainer_state.snapshot(self._engine, self.version, self._copies)
                finally:
                    self._copied.set()
                return self._write(folder, weights, adapters, tensors, facts)
            finally:
                self._copies.lend()

        self._writer.start(write)

    def _wait_for_copies(self) -> None:
        """Before the state changes: let a checkpoint have its copies of it."""
        begun = time.perf_counter()
        self._copied.wait()
        self._waited += time.perf_counter() - begun

    def saved(self, wait: bool) -> dict[str, FileFacts] | None:
        """What the last save wrote, by path in its folder, once it is on disk; None before. Raises what kept it from
        there."""
        return self._writer.answer if self._writer.done(wait) else None

    def _write(
        self, folder: Path, weights: Tensors, adapters: Tensors, tensors: Tensors, facts: dict[str, Any]
    ) -> dict[str, FileFacts]:
        rank, trainer = self.options.rank, folder / TRAINER
        if rank == 0:
            self._write_model(folder, weights)
        if adapters:
            self._policy.adapters.write(folder / FOLDER, adapters)
        trainer_state.write(trainer, rank, tensors, facts)
        flush_to_disk(folder)
        shared = [path for path in folder.rglob("*") if path.parent != trainer and path.is_file()] if rank == 0 else []
        return {str(path.relative_to(folder)): described(path) for path in [*shared, *trainer.glob(f"rank_{rank}.*")]}

    def _write_model(self, folder: Path, weights: dict[str, Any]) -> None:
        model = self._policy.model
        write_model(folder, weights, [model.config, model.generation_config], self._tokenizer)

    def load_trainer_state(self, folder: Path) -> None:
        """Put back what `begin_save` wrote, whatever the ranks and the ZeRO stage then; the engine was built from the
        same checkpoint's weights."""
        self.version = resharding.load(self._engine, folder, self.options.rank)

    def close(self) -> None:
        """Finish writing and leave the process group."""
        self._writer.done(wait=True)
        if dist.is_initialized():
            dist.destroy_process_group()


def with_old_logprobs(sequences: ListOf[Sequence], answers: list[tuple[int, np.ndarray]]) -> list[Sequence]:
    """The sequences, those that will be trained on with the pi_old that the ranks answered to `logprobs`."""
    old = dict(answers)
    return [replace(s, old_logprobs=old.get(i)) for i, s in enumerate(sequences)]
