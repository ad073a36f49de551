"""What a run works on, made before any actor starts: the model's folder and the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from cluster.curation import Say, curate
from configs.errors import UsageError
from configs.schema import BUILT_IN_MODEL, Config
from data.demonstrations import with_demonstrations
from data.errors import DatasetError
from data.escaping import block
from data.prompts import make_template, render_all
from data.records import Problem, Prompt
from learner.model_cache import ModelError
from learner.pretrained import resolve_model
from learner.warm_start import warm_start


@dataclass(frozen=True)
class Materials:
    """model_path: a Hugging Face folder; train and held_out: rendered prompts, disjoint by id.

    For supervised fine-tuning the training prompts carry their demonstrations.
    """

    model_path: Path
    train: list[Prompt]
    held_out: list[Prompt]


def prepare(config: Config, say: Say) -> Materials:
    """Load, split and render the problems; find, convert or warm-start the model.

    UsageError, one paragraph, for whatever is wrong with either.
    """
    try:
        train, held_out = curate(config, say)
        model_path = _model(config, [*train, *held_out], say)
        return _render(config, model_path, train, held_out, say)
    except (DatasetError, ModelError) as error:
        raise UsageError(str(error)) from error


def _model(config: Config, problems: list[Problem], say: Say) -> Path:
    if config.model.name != BUILT_IN_MODEL:
        return resolve_model(config.model)
    steps = config.model.warm_start.steps

    def on_step(step: int, loss: float) -> None:
        if step % max(1, steps // 5) == 0:
            say(f"warm start: step {step}/{steps}, loss {loss:.3f}")

    return warm_start(
        config.model,
        config.data,
        config.rewards.reasoning_tag,
        config.rewards.answer_tag,
        avoid_ids={problem.id for problem in problems},
        on_step=on_step,
        on_note=say,
    )


def _render(config: Config, model_path: Path, train: list[Problem], held_out: list[Problem], say: Say) -> Materials:
    data = config.data
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    template = make_template(data, config.rewards.reasoning_tag)
    rendered = {}
    for name, problems in (("training", train), ("held-out", held_out)):
        prompts, dropped = render_all(tokenizer, problems, template, data.max_prompt_tokens)
        if not prompts:
            raise DatasetError(
                f"All {dropped} {name} prompts are longer than data.max_prompt_tokens={data.max_prompt_tokens}. "
                "Raise it (and learner.tokens_per_micro_batch with it), or shorten the prompts or data.few_shot."
            )
        note = f", {dropped} dropped as longer than data.max_prompt_tokens" if dropped else ""
        say(f"{len(prompts)} {name} prompts{note}")
        rendered[name] = prompts
    training = rendered["training"]
    say(f"first prompt:\n{block(tokenizer.decode(training[0].token_ids))}")
    if config.learner.supervised:
        training, dropped = with_demonstrations(tokenizer, training, config.rollout.max_completion_tokens)
        note = f", {dropped} dropped as longer than rollout.max_completion_tokens" if dropped else ""
        say(f"{len(training)} demonstrations{note}")
        say(f"first demonstration:\n{block(tokenizer.decode(training[0].demonstration_ids))}")
    return Materials(model_path, training, rendered["held-out"])


def find_model(config: Config, say: Say) -> Path:
    """The folder of `model.name`, as a run starts from it. ModelError or DatasetError for what stands in the way."""
    problems: list[Problem] = []
    if config.model.name == BUILT_IN_MODEL:  # its warm start avoids the problems of the run
        train, held_out = curate(config, lambda _: None)
        problems = [*train, *held_out]
    return _model(config, problems, say)
