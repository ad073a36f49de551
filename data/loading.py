"""Loading what data.dataset names: generated problems, a preset, a file, or a hub dataset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.arithmetic import generate
from data.errors import DatasetError
from data.golds import CheckGold, GoldRule
from data.gym import PREFIX as GYM
from data.gym import check_task, generate_task
from data.presets import find_preset, open_preset
from data.records import Problem
from data.rows import BadRow, Filters, Reading, read_problems
from data.tables import FORMATS, is_local, read_table

ARITHMETIC = "arithmetic"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One dataset and how it is read.

    dataset: "arithmetic", "reasoning-gym:TASK", a preset's name, a .jsonl, .json or .parquet file, or a hub
    name ("owner/name" or "owner/name:config"). split and the columns count for files and the hub, directory
    for presets, count and seed for what is generated, operands, digits and operators for arithmetic. Of all
    that is not generated every row is taken.
    """

    dataset: str
    split: str = "train"
    question_column: str = "question"
    answer_column: str = "answer"
    demonstration_column: str | None = None
    gold: GoldRule = "auto"
    filters: Filters = field(default_factory=dict)
    directory: Path | None = None
    count: int = 4096
    seed: int = 0
    operands: int = 2
    digits: int = 2
    operators: str = "+-"


def load_source(source: Source, check_gold: CheckGold | None = None) -> tuple[list[Problem], Sequence[BadRow]]:
    """(the problems, the bad rows), in the dataset's order, duplicates included.

    Raises DatasetError for whatever stands in the way, naming file, row and column.
    """
    if source.dataset == ARITHMETIC:
        return generate(source.count, source.seed, source.operands, source.digits, source.operators), ()
    if source.dataset.startswith(GYM):
        return generate_task(source.dataset.removeprefix(GYM), source.count, source.seed), ()
    if is_local(source.dataset) or "/" in source.dataset:
        table, name, gold = read_table(source.dataset, source.split), source.dataset, source.gold
        reading = Reading(source.question_column, source.answer_column)
    else:
        table, name, reading = open_preset(source.dataset, "train", source.directory)
        gold = reading.gold if source.gold == "auto" else source.gold
    reading = replace(reading, gold=gold, demonstration=source.demonstration_column, filters=source.filters)
    return read_problems(table, name, reading, check_gold)


def check_name(dataset: str, directory: Path | None) -> bool:
    """Whether a dataset can be loaded without a network; a name that means nothing is a DatasetError."""
    if dataset == ARITHMETIC or is_local(dataset):
        return True
    if dataset.startswith(GYM):
        check_task(dataset.removeprefix(GYM))
        return True
    if "/" not in dataset:
        find_preset(dataset, "train")
        return directory is not None
    if not _HUB_NAME.fullmatch(dataset):
        raise DatasetError(
            f"The dataset {dataset!r} is no name on the hub, which is owner/name or owner/name:config. Correct it, or "
            f"give a file whose name ends in {', '.join(FORMATS)}."
        )
    return False
