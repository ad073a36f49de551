"""Tables of rows: a local JSON, JSONL or Parquet file, or a split of a dataset on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DatasetError
from data.escaping import escaped
from data.hub import check_hub, hub_errors
from data.json_text import bad_line, check_json

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_table(dataset: str, split: str) -> Dataset:
    """The rows that a dataset's name stands for: a local file or folder, "owner/name" or "owner/name:config".

    split: of a folder and of the hub; of a file every row is taken.
    Raises DatasetError, one paragraph, for whatever cannot be read.
    """
    path = Path(os.path.expanduser(dataset))
    if os.path.isdir(path) and path.suffix not in FORMATS:
        return read_hub(str(path), None, split)
    if is_local(dataset):
        return read_file(path)
    name, _, config = dataset.partition(":")
    return read_hub(name, config or None, split)


def is_local(dataset: str) -> bool:
    """Whether a dataset's name means a path here, be there something or not."""
    path = Path(os.path.expanduser(dataset))
    return path.suffix in FORMATS or os.path.exists(path) or dataset.startswith((".", "/", "~"))


def read_file(path: Path) -> Dataset:
    """Every row of a local JSON, JSONL or Parquet file."""
    if path.suffix not in FORMATS:
        raise DatasetError(
            f"The dataset {path} is not a file that can be read: its name must end in {', '.join(FORMATS)}. "
            "Give such a file, or a dataset's name on the hub, in data.dataset."
        )
    if not os.path.isfile(path):
        raise DatasetError(
            f"The dataset {path} does not exist or is no file (looked for {os.path.abspath(path)}). Correct "
            "data.dataset; a relative path counts from the folder the command is started in."
        )
    _check_readable(path)
    if FORMATS[path.suffix] == "json":
        check_json(path)
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        with _quiet_datasets():
            rows = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        cause = bad_line(path) if path.suffix == ".jsonl" else None
        raise DatasetError(
            f"The dataset {path} cannot be read as {FORMATS[path.suffix]}: {cause or _root_cause(error)}. Correct "
            "that, or write the file anew; JSONL has one JSON object with the same columns in every line."
        ) from error
    assert isinstance(rows, Dataset)
    return rows


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            if any(line.strip() for line in file):
                return
    except OSError as error:
        raise DatasetError(
            f"The dataset {path} cannot be read ({error}). Give this user the right to, or set data.dataset to another."
        ) from error
    raise DatasetError(f"The dataset {path} is empty. Put at least one problem a line into it.")


def read_hub(name: str, config: str | None, split: str) -> Dataset:
    """Every row of one split of "owner/name" on the Hugging Face hub, or of a folder laid out like one there."""
    from datasets import load_dataset

    errors = hub_errors()
    try:
        if not Path(name).exists():
            check_hub("dataset", name)
        return load_dataset(name, config, split=split)
    except errors as error:  # no such name, split or config; no network
        shown = name if config is None else f"{name}:{config}"
        raise DatasetError(
            f"The dataset {shown!r} (split {split!r}) could not be loaded from the Hugging Face hub: "
            f"{_root_cause(error)}. Check the name, the split (data.split) and the network; a config is given as "
            "'owner/name:config', a local file ends in .jsonl, .json or .parquet, and presets are read from a folder "
            "with data.directory."
        ) from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keeps the library from logging, beside our error, what our error says, and from showing bars."""
    from datasets import disable_progress_bars, enable_progress_bars
    from datasets.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    disable_progress_bars()
    set_verbosity(CRITICAL)
    try:
        yield
    finally:
        set_verbosity(verbosity)
        enable_progress_bars()


def _root_cause(error: BaseException) -> str:
    """The innermost error's text, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "corresponds to no data" in str(error):  # what `datasets` says of rows without a column
        return "it has no rows with columns"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return escaped(text if len(text) <= 300 else text[:299] + "…").rstrip(".")
