"""Supervised fine-tuning, the baseline of RL: the same learner, data and logging, and demonstrations to imitate."""

from __future__ import annotations

import numpy as np

from cluster.loop import Clock, Run, Updates, report
from cluster.update_metrics import combined
from configs.schema import Config
from data.records import Prompt
from learner.alarms import NO_LIMITS, PREFIX, Limits
from learner.batching import Sequence
from learner.from_groups import update_batches

# Of an update's metrics those that mean in supervised fine-tuning what they mean in RL; nothing was sampled,
# so there is no ratio to clip and no sampler to compare with.
KEPT = {
    "policy/loss",
    "policy/entropy",
    "policy/grad_norm",
    "policy/learning_rate",
    "policy/updates",
    "tokens/trained",
    "time/checkpoint_wait",
}


def supervised_step(run: Run, step: int) -> None:
    """One step: the next prompts, updates on their demonstrations, weights pushed for the evaluation."""
    config, clock = run.config, Clock()
    prompts = run.sampler.take(config.rollout.prompts_per_batch)
    run.account.note(trained=len(prompts))
    run.turns.learning()
    learned = imitate(run.actors.learner, config, prompts, run.guards.limits())
    clock.add("update", clock.lap())
    run.version += int(learned["policy/updates"])
    run.turns.pushing()
    learned |= run.actors.rollouts.push(run.actors.learner.sync_weights)
    run.turns.sampling()
    clock.add("sync", clock.lap())
    run.checkpoints.poll(run.actors.learner)
    metrics = {**learned, "policy/version": float(run.version)}
    report(run, step, {**metrics, **clock.metrics(learned["tokens/trained"] * learned["policy/updates"])})


def imitate(learner: Updates, config: Config, prompts: list[Prompt], limits: Limits = NO_LIMITS) -> dict[str, float]:
    """The optimizer steps of one batch of demonstrations; metrics are means over them, policy/updates their number."""
    sequences = [sequence_of(prompt) for prompt in prompts]
    batches = update_batches(sequences, config.completions_per_update, config.learner.tokens_per_update)
    updates = [learner.update(batch, False, limits) for batch in batches * config.learner.epochs_per_batch]
    names = {*KEPT, "policy/kl"} if config.learner.needs_reference else KEPT
    return {name: value for name, value in combined(updates).items() if name in names or name.startswith(PREFIX)}


def sequence_of(prompt: Prompt) -> Sequence:
    """A prompt with its demonstration; it has no sampler, whose log-probs are zeros here, and is all to be learnt."""
    return Sequence(
        prompt_ids=np.asarray(prompt.token_ids, dtype=np.int32),
        completion_ids=np.asarray(prompt.demonstration_ids, dtype=np.int32),
        sampler_logprobs=np.zeros(len(prompt.demonstration_ids), dtype=np.float32),
        advantage=1.0,
    )
