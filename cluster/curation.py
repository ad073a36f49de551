"""The problems that a config's data block asks for: loaded, cleaned and split, or only checked before a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.gold_checks import gold_check
from configs.errors import UsageError
from configs.schema import Config
from data.decontamination import decontaminate
from data.demonstrations import work_out
from data.errors import DatasetError
from data.escaping import excerpt
from data.loading import ARITHMETIC, Source, check_name, load_source
from data.pass_rates import choose_by_pass_rate, read_pass_rates
from data.presets import find_file, find_preset, load_preset
from data.problems import split_held_out
from data.prompts import make_template
from data.records import Problem, Prompt
from data.rows import BadRow, refuse
from data.sampler import PromptSampler

Say = Callable[[str], None]


def curate(config: Config, say: Say) -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems), disjoint by id; what was dropped, and why, is said.

    Both are free of the benchmarks in data.decontaminate. Pass rates choose among the training
    problems alone, so that runs which choose differently are measured on the same held-out problems.
    Raises DatasetError.
    """
    data = config.data
    problems = [problem for dataset in data.sources for problem in _load(config, dataset, say)]
    if data.decontaminate:
        problems = _decontaminated(config, problems, say)
    train, held_out = split_held_out(problems, data.held_out_problems, config.training.seed)
    if data.pass_rates is not None:
        train = _chosen(config, train, say)
    first = [_first(train, dataset, data.train_problems) for dataset in data.mixture or [""]]
    return [problem for part in first for problem in part], held_out


def check_dataset(config: Config, say: Say) -> None:
    """What is wrong with the data block as far as files here can tell: no network, no model. Raises UsageError.

    Datasets and benchmarks on the hub are checked by name; all others are loaded, row by row, and what is
    dropped of them is said.
    """
    data = config.data
    directory = _directory(config)
    try:
        make_template(data, config.rewards.reasoning_tag)
        here = [dataset for dataset in data.sources if check_name(dataset, directory)]
        for benchmark in data.decontaminate:
            preset = find_preset(benchmark, "test")
            if directory is not None:
                find_file(preset, "test", directory)
        if len(here) == len(data.sources) and (directory is not None or not data.decontaminate):
            train, held_out = curate(config, say)
            say(f"{len(train):,} training problems, {len(held_out):,} held out")
            return
        for dataset in here:
            _load(config, dataset, say)
        if data.pass_rates is not None:
            read_pass_rates(Path(data.pass_rates).expanduser())
    except DatasetError as error:
        raise UsageError(str(error)) from error


def make_sampler(config: Config, prompts: Sequence[Prompt], cursor: int = 0) -> PromptSampler:
    """The run's sampler, at a cursor."""
    data = config.data
    return PromptSampler(prompts, config.training.seed, cursor, data.mixture or None, data.curriculum)


def _load(config: Config, dataset: str, say: Say) -> list[Problem]:
    data = config.data
    supervised = config.learner.supervised
    source = Source(
        dataset=dataset,
        split=data.split,
        question_column=data.question_column,
        answer_column=data.answer_column,
        demonstration_column=data.demonstration_column if supervised else None,
        gold=data.gold,
        filters=data.filters,
        directory=_directory(config),
        count=data.train_problems + data.held_out_problems,
        seed=config.training.seed,
        operands=data.operands,
        digits=data.digits,
        operators=data.operators,
    )
    with gold_check(config.rewards, dataset) as check:
        problems, bad = load_source(source, check)
    if data.unparsable_golds == "refuse":
        refuse(dataset, bad)
    elif bad:
        say(_dropped_rows(dataset, problems, bad))
    if supervised and dataset == ARITHMETIC:
        problems = work_out(problems, config.rewards.reasoning_tag, config.rewards.answer_tag)
    return [replace(problem, source=dataset) for problem in problems] if data.mixture else problems


def _dropped_rows(dataset: str, problems: Sequence[Problem], bad: Sequence[BadRow]) -> str:
    if not problems:
        raise DatasetError(f"All {len(bad)} rows of the dataset {dataset} are bad: {'; '.join(map(str, bad[:3]))}.")
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    shown = "; ".join(map(str, bad[:3]))
    return f"{dataset}: {len(bad)} of {len(problems) + len(bad)} rows dropped: {shown}{more}"


def _decontaminated(config: Config, problems: list[Problem], say: Say) -> list[Problem]:
    names = config.data.decontaminate
    benchmarks = {name: load_preset(name, "test", _directory(config)) for name in names}
    examples = [Problem("", example.question, example.answer) for example in config.data.few_shot]
    if shown := decontaminate(examples, benchmarks)[1]:
        raise DatasetError(
            f"data.few_shot shows the model what {shown[0].benchmark} asks: {excerpt(shown[0].first)}. Choose examples "
            "from the training data."
        )
    clean, found = decontaminate(problems, benchmarks)
    if not clean:
        raise DatasetError(
            f"data.decontaminate dropped all {len(problems)} problems: they stand in {', '.join(names)}. Train on "
            "another data.dataset, or do not report that benchmark."
        )
    if not found:
        say(f"decontamination: none of {len(problems)} problems stands in {', '.join(names)}")
        return clean
    texts = "; ".join(f"{each.benchmark} contains {each.count}, the first {excerpt(each.first)}" for each in found)
    say(f"decontamination: {len(problems) - len(clean)} of {len(problems)} problems dropped; {texts}")
    return clean


def _chosen(config: Config, problems: list[Problem], say: Say) -> list[Problem]:
    low, high = config.data.pass_rate_range
    assert config.data.pass_rates is not None  # asked by the caller
    chosen = choose_by_pass_rate(problems, read_pass_rates(Path(config.data.pass_rates).expanduser()), low, high)
    say(
        f"pass rates: {len(chosen.problems)} training problems within [{low:g}, {high:g}]; dropped {chosen.outside} "
        f"outside it and {chosen.unmeasured} that were not measured"
    )
    return chosen.problems


def _first(problems: list[Problem], source: str, count: int) -> list[Problem]:
    return [problem for problem in problems if problem.source == source][:count]


def _directory(config: Config) -> Path | None:
    return None if config.data.directory is None else Path(config.data.directory).expanduser()
