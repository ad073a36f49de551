"""Pairs of options, of different sections, that contradict each other: each rule is a text with the fix, or None."""

from __future__ import annotations

from math import isqrt
from os.path import expanduser
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import Config


MAX_COMPLETIONS = 2**24  # of a sampling batch, which the driver holds in memory


def contradictions(config: Config) -> list[str]:
    """One text for every rule that the config breaks."""
    return [text for text in (rule(config) for rule in RULES) if text]


def _updates_fill_the_batch(config: Config) -> str | None:
    wanted, batch = config.completions_per_update, config.completions_per_batch
    if batch % wanted == 0:
        return None
    divisors = {d for n in range(1, isqrt(batch) + 1) if batch % n == 0 for d in (n, batch // n)}
    below = max(d for d in divisors if d <= wanted)
    above = min((d for d in divisors if d >= wanted), default=batch)
    choices = " or ".join(str(n) for n in sorted({below, above}))
    times = (
        "demonstrations"
        if config.learner.supervised
        else (f"times rollout.completions_per_prompt={config.rollout.completions_per_prompt}")
    )
    return (
        f"learner.completions_per_update={wanted} does not divide the sampling batch of {batch} completions "
        f"(rollout.prompts_per_batch={config.rollout.prompts_per_batch} {times}); choose {choices}, or auto for the "
        "whole batch"
    )


def _the_batch_can_be_held(config: Config) -> str | None:
    rollout, batch = config.rollout, config.completions_per_batch
    if batch <= MAX_COMPLETIONS:
        return None
    return (
        f"rollout.prompts_per_batch={rollout.prompts_per_batch} times rollout.completions_per_prompt="
        f"{rollout.completions_per_prompt} is a sampling batch of {batch} completions, which no machine holds; lower "
        f"them to at most {MAX_COMPLETIONS} in all"
    )


def _micro_batch_holds_a_completion(config: Config) -> str | None:
    budget = config.learner.tokens_per_micro_batch
    if config.max_tokens <= budget:
        return None
    return (
        f"learner.tokens_per_micro_batch={budget} cannot hold the longest prompt with its completion, "
        f"{config.max_tokens} tokens (data.max_prompt_tokens={config.data.max_prompt_tokens} plus "
        f"rollout.max_completion_tokens={config.rollout.max_completion_tokens}); raise it to at least "
        f"{config.max_tokens}, or lower the other two"
    )


def _warmup_ends(config: Config) -> str | None:
    updates = config.training.steps * config.updates_per_batch
    if config.learner.warmup <= max(updates, 1):
        return None
    return (
        f"learner.warmup={config.learner.warmup:g} optimizer steps is longer than the run of {updates} "
        f"(training.steps={config.training.steps} times {config.updates_per_batch} per step), so the peak "
        f"learning rate would never come; lower it, or write a share such as 0.1"
    )


def _a_group_has_others(config: Config) -> str | None:
    rollout, objective = config.rollout, config.learner.objective
    if rollout.completions_per_prompt >= 2 or objective in ("a_star_po", "sft"):
        return None
    return (
        f"rollout.completions_per_prompt={rollout.completions_per_prompt} leaves learner.objective={objective} "
        "nothing to compare a completion with; choose at least 2"
    )


def _a_budget_makes_one_update(config: Config) -> str | None:
    learner = config.learner
    if learner.tokens_per_update is None or learner.completions_per_update == "auto":
        return None
    return (
        f"learner.tokens_per_update={learner.tokens_per_update} fills one update batch by tokens and contradicts "
        f"learner.completions_per_update={learner.completions_per_update}; leave one of them out"
    )


def _a_budget_holds_a_completion(config: Config) -> str | None:
    budget, longest = config.learner.tokens_per_update, config.rollout.max_completion_tokens
    if budget is None or budget >= longest:
        return None
    return (
        f"learner.tokens_per_update={budget} cannot hold the longest completion, rollout.max_completion_tokens="
        f"{longest}; raise it to at least {longest}, better to the tokens of a usual sampling batch"
    )


def _a_star_compares_with_a_fixed_reference(config: Config) -> str | None:
    learner, rollout = config.learner, config.rollout
    if learner.objective != "a_star_po":
        return None
    wrong = {
        "learner.kl_coefficient": learner.kl_coefficient > 0,
        "learner.filter_threshold": learner.filter_threshold is not None,
        "learner.reference_reset": learner.reference_reset != "never",
        "rollout.refill_rounds": rollout.refill_rounds > 0,
    }
    given = ", ".join(key for key, set_ in wrong.items() if set_)
    if not given:
        return None
    return (
        f"learner.objective=a_star_po regresses every completion on a value of the initial policy, which {given} "
        "contradicts; leave it out"
    )


def _something_is_reset(config: Config) -> str | None:
    learner = config.learner
    if learner.reference_reset == "never" or learner.kl_coefficient > 0:
        return None
    return (
        f"learner.reference_reset={learner.reference_reset} has no reference to reset, as learner.kl_coefficient is "
        "0; set it (ProRL: 1e-4), or leave the reset out"
    )


def _demonstrations_exist(config: Config) -> str | None:
    data = config.data
    if not config.learner.supervised or data.generated:
        return None
    if "reasoning-gym" in data.kinds:
        return (
            "learner.objective=sft imitates demonstrations, and the problems of reasoning-gym have none; choose "
            "another data.dataset"
        )
    if data.demonstration_column is not None:
        return None
    return (
        f"learner.objective=sft imitates demonstrations, and {_named(config)} has none as long as "
        "data.demonstration_column is null; name the column with the completions to imitate"
    )


def _named(config: Config) -> str:
    data = config.data
    return f"data.mixture of {', '.join(data.mixture)}" if data.mixture else f"data.dataset={data.dataset}"


def _demonstrations_have_no_rewards(config: Config) -> str | None:
    learner = config.learner
    if not learner.supervised:
        return None
    wrong = {
        "learner.filter_threshold": learner.filter_threshold is not None,
        "learner.reference_reset": learner.reference_reset != "never",
        "rollout.refill_rounds": config.rollout.refill_rounds > 0,
        "rewards.shuffle": config.rewards.shuffle,
    }
    given = ", ".join(key for key, set_ in wrong.items() if set_)
    if not given:
        return None
    return (
        f"learner.objective=sft imitates demonstrations, which have neither groups nor rewards, and {given} "
        "contradicts that; leave it out"
    )


def _overlong_begins_within_a_completion(config: Config) -> str | None:
    buffer, longest = config.rewards.overlong_buffer, config.rollout.max_completion_tokens
    if "overlong" not in config.rewards.weights or buffer < longest:
        return None
    return (
        f"rewards.overlong_buffer={buffer} leaves no completion of up to rollout.max_completion_tokens={longest} "
        "tokens without a penalty; choose less, such as a fifth of it"
    )


def _adapters_keep_their_reference(config: Config) -> str | None:
    rank, reset = config.model.lora_rank, config.learner.reference_reset
    if not rank or reset == "never":
        return None
    return (
        f"learner.reference_reset={reset} cannot reset the reference of model.lora_rank={rank}, which is the base "
        "under disabled adapters; leave the reset out, or train all weights with model.lora_rank=0"
    )


def _an_offloaded_optimizer_is_sharded(config: Config) -> str | None:
    learner = config.learner
    if learner.optimizer != "adamw_cpu" or learner.zero_stage > 0:
        return None
    return (
        "learner.optimizer=adamw_cpu keeps its states in the CPU's memory by ZeRO-Offload, which learner.zero_stage=0 "
        "does not have; choose learner.zero_stage=1, 2 or 3, or learner.optimizer=adamw_8bit"
    )


def _demonstrations_are_never_stale(config: Config) -> str | None:
    if not config.learner.supervised or not config.cluster.resolved_max_staleness:
        return None
    return (
        "learner.objective=sft samples nothing to learn from, so nothing can be stale; set cluster.max_staleness=0, "
        "or leave it and cluster.placement out"
    )


def _homes_exist(config: Config) -> str | None:
    data = config.data
    paths = {
        "model.name": config.model.name,
        "model.cache_dir": config.model.cache_dir,
        "data.dataset": data.dataset,
        "data.directory": data.directory or "",
        "data.pass_rates": data.pass_rates or "",
        "data.chat_template": data.chat_template,
        "training.runs_dir": config.training.runs_dir,
    }
    for key, path in paths.items():
        if expanduser(path).startswith("~"):
            return f"{key}={path} begins with the home of a user whom nobody knows here; write the path out"
    return None


RULES = (
    _updates_fill_the_batch,
    _the_batch_can_be_held,
    _micro_batch_holds_a_completion,
    _warmup_ends,
    _a_group_has_others,
    _a_budget_makes_one_update,
    _a_budget_holds_a_completion,
    _a_star_compares_with_a_fixed_reference,
    _something_is_reset,
    _adapters_keep_their_reference,
    _demonstrations_exist,
    _demonstrations_have_no_rewards,
    _overlong_begins_within_a_completion,
    _an_offloaded_optimizer_is_sharded,
    _demonstrations_are_never_stale,
    _homes_exist,
)
