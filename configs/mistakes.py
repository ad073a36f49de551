"""Mistakes in a config, in words: the key, where it stands, what came, what was expected, the fix."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from configs.options import OPTIONS, SECTIONS, Option, find_option, nearest_keys
from configs.schema import BUILT_IN_DATASET, BUILT_IN_MODEL, GUARDS, Config

COMMAND_LINE = "command line"
SAMPLED_GUARDS = sorted(set(GUARDS) - {"nan", "grad_norm"})  # which ask what was sampled


@dataclass(frozen=True)
class Setting:
    """One value given by the user, and where: `x.yaml, line 3` or `command line`."""

    key: str
    value: Any
    source: str


def shown(value: object) -> str:
    """Returns a value as a message shows it: as JSON, cut to a line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def paragraph(mistakes: Sequence[str]) -> str:
    """Joins the texts of mistakes, numbered if there are several."""
    if len(mistakes) == 1:
        return f"{mistakes[0]}."
    listed = " ".join(f"({number}) {text}." for number, text in enumerate(mistakes, 1))
    return f"The config has {len(mistakes)} mistakes. {listed}"


def key_mistake(setting: Setting) -> str | None:
    """Returns what is wrong with the setting's key, if it is no option."""
    if find_option(setting.key):
        return None
    if setting.key in SECTIONS:
        first = next(key for key in OPTIONS if key.startswith(f"{setting.key}."))
        return (
            f"{setting.source}: {setting.key} is a section and takes no value of its own, but got "
            f"{shown(setting.value)}; set the options in it, such as {first}"
        )
    return (
        f"{setting.source}: there is no option {setting.key} (given {shown(setting.value)})."
        f" {did_you_mean(setting.key)}"
    )


def did_you_mean(key: str) -> str:
    """Returns the nearest valid keys, or else what stands in that section, or the sections."""
    if nearest := nearest_keys(key):
        return f"Did you mean {' or '.join(nearest)}? Correct the key; --help explains every option"
    section = key.partition(".")[0]
    if inside := [option for option in OPTIONS if option.startswith(f"{section}.")]:
        return f"The options there are {', '.join(inside)}; use one of them, or remove this one"
    sections = [name for name in SECTIONS if "." not in name]
    return f"The sections are {', '.join(sections)}; --help explains every option in them"


def value_mistakes(error: ValidationError, settings: Sequence[Setting], everywhere: str) -> list[str]:
    """Returns one text for each wrong value and each broken rule of the schema.

    `everywhere` names the sources together: a rule between options belongs to no single line.
    """
    latest = {setting.key: setting for setting in settings}
    texts: list[str] = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "value_error":
            texts += [f"{everywhere}: {line}" for line in str(detail["ctx"]["error"]).split("\n")]
        else:
            texts.append(_wrong_value([str(part) for part in detail["loc"]], latest))
    return list(dict.fromkeys(texts))  # pydantic reports every member of a union


def _wrong_value(location: list[str], latest: dict[str, Setting]) -> str:
    candidates = [".".join(location[:length]) for length in range(len(location), 0, -1)]
    setting = next(latest[key] for key in candidates if key in latest)
    option = find_option(setting.key)
    assert option is not None, setting.key  # unknown keys never reach pydantic
    expected = option.expected if setting.key == option.key else option.entry
    return f"{setting.source}: {setting.key} is {shown(setting.value)}; expected {expected}; {_fix(setting, option)}"


def _fix(setting: Setting, option: Option) -> str:
    if option.is_text and isinstance(setting.value, bool | int | float):
        return "put it in quotes to make it text"
    if setting.key != option.key:
        example = "1.0" if "number" in option.entry else "skip" if "skip" in option.entry else "easy"
        return f"write for example {setting.key}={example}"
    return f"correct it, or remove it for the default, {shown(option.default)}"


@dataclass(frozen=True)
class _Use:
    """Options that have an effect only in some configs."""

    keys: tuple[str, ...]
    used: Callable[[Config], bool]
    condition: str


_USES = (
    _Use(
        ("model.warm_start.",),
        lambda config: config.model.name == BUILT_IN_MODEL,
        f"only model.name={BUILT_IN_MODEL} is built and warm-started here",
    ),
    _Use(
        ("model.lora_alpha",),
        lambda config: config.model.lora_rank > 0,
        "model.lora_rank=0 trains all weights, without adapters",
    ),
    _Use(
        ("data.operands", "data.digits", "data.operators"),
        lambda config: "arithmetic" in config.data.kinds,
        f"only the problems of data.dataset={BUILT_IN_DATASET} are generated here",
    ),
    _Use(
        ("data.question_column", "data.answer_column"),
        lambda config: bool(config.data.kinds & {"file", "hub"}),
        "only files and hub datasets have columns to name; generated problems have none, presets know theirs",
    ),
    _Use(
        ("data.split",),
        lambda config: "hub" in config.data.kinds,
        "only a hub dataset has splits",
    ),
    _Use(
        ("data.dataset",),
        lambda config: not config.data.mixture,
        "data.mixture stands in its place",
    ),
    _Use(
        ("data.directory",),
        lambda config: "preset" in config.data.kinds or bool(config.data.decontaminate),
        "no dataset is a preset and data.decontaminate names no benchmark",
    ),
    _Use(
        ("data.gold", "data.filters", "data.unparsable_golds"),
        lambda config: bool(config.data.kinds & {"preset", "file", "hub"}),
        "generated problems have no rows",
    ),
    _Use(
        ("data.pass_rate_range",),
        lambda config: config.data.pass_rates is not None,
        "data.pass_rates=null measures none",
    ),
    _Use(
        ("learner.min_learning_rate_ratio",),
        lambda config: config.learner.schedule != "constant",
        "learner.schedule=constant never lowers the learning rate",
    ),
    _Use(
        ("learner.kl_estimator",),
        lambda config: config.learner.kl_coefficient > 0,
        "learner.kl_coefficient=0 estimates no KL",
    ),
    _Use(
        ("learner.reference_reset_steps", "learner.reset_optimizer"),
        lambda config: config.learner.reference_reset != "never",
        "learner.reference_reset=never resets nothing",
    ),
    _Use(
        ("learner.importance_cap",),
        lambda config: config.learner.importance_correction != "off",
        "learner.importance_correction=off has nothing to cap",
    ),
    _Use(
        ("learner.a_star_",),
        lambda config: config.learner.objective == "a_star_po",
        "only learner.objective=a_star_po asks for it",
    ),
    _Use(
        ("learner.advantage", "learner.clip_", "learner.ratio_cap", "learner.importance_"),
        lambda config: config.learner.objective != "a_star_po",
        "learner.objective=a_star_po regresses on rewards and has neither ratio nor group",
    ),
    _Use(
        ("learner.clip_",),
        lambda config: config.learner.objective != "cispo",
        "learner.objective=cispo clips no ratio; learner.ratio_cap caps its weight",
    ),
    _Use(
        ("data.demonstration_column",),
        lambda config: config.learner.supervised and not config.data.generated,
        f"only learner.objective=sft imitates, and data.dataset={BUILT_IN_DATASET} writes its own demonstrations",
    ),
    _Use(
        ("rewards.overlong_buffer",),
        lambda config: "overlong" in config.rewards.weights,
        "only the reward overlong asks for it, and rewards.weights does not name that",
    ),
    _Use(
        ("rewards.cosine_",),
        lambda config: "cosine" in config.rewards.weights,
        "only the reward cosine asks for it, and rewards.weights does not name that",
    ),
    _Use(
        ("rewards.script",),
        lambda config: "language" in config.rewards.weights,
        "only the reward language asks for it, and rewards.weights does not name that",
    ),
    _Use(
        ("rewards.unsafe_code",),
        lambda config: "code" in config.rewards.weights,
        "only the reward code runs programs, and rewards.weights does not name that",
    ),
    _Use(
        (
            *(f"training.guards.{guard}" for guard in SAMPLED_GUARDS),
            "rollout.completions_per_prompt",
            "rollout.temperature",
            "rollout.top_",
            "rollout.logprob_diff_",
            "learner.advantage",
            "learner.mask_truncated",
            "learner.clip_",
            "learner.ratio_cap",
            "learner.importance_",
            "learner.a_star_",
        ),
        lambda config: not config.learner.supervised,
        "learner.objective=sft imitates demonstrations and samples nothing to learn from",
    ),
)


def idle_mistake(setting: Setting, config: Config) -> str | None:
    """Returns why a setting would have no effect in `config`.

    Asked of overrides only, which someone means: a recipe may well carry `data.digits` that an
    override of data.dataset leaves without use.
    """
    for use in _USES:
        if setting.key.startswith(use.keys) and not use.used(config):
            return (
                f"{setting.source}: {setting.key}={shown(setting.value)} would have no effect, as "
                f"{use.condition}; remove it"
            )
    return None
