"""Mistakes made by chance: whatever the values and bytes, it is a config, a dataset or a model, or a message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configs.errors import RunError, UsageError
from configs.loading import dump_config, load_config
from configs.options import OPTIONS
from configs.schema import Config, Model
from configs.yaml_text import write_yaml
from data.errors import DatasetError
from data.loading import Source, load_source
from data.prompts import Template, check_template
from learner.model_cache import ModelError
from learner.policy import load_policy
from learner.pretrained import find_here
from tests.bad_corpus import ROWS, jsonl
from tests.tiny import tiny_llama

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
# Always the same examples: a red run is then red for whoever repeats it.
settings.register_profile(
    "corpus", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CORPUS = settings.get_profile("corpus")


def paragraph(text: str, *named: str) -> None:
    assert text.isprintable() and text.rstrip()[-1] in ".?)" and len(text.split()) >= 6, text
    assert all(name in text for name in named), text


@settings(CORPUS, max_examples=400)
@given(key=st.sampled_from(sorted(OPTIONS)), value=JSON)
def test_any_value_of_any_option_is_taken_or_the_option_is_named(key: str, value: object, tmp_path: Path) -> None:
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    file = tmp_path / "x.yaml"
    file.write_text(write_yaml(tree), encoding="utf-8")
    try:
        config = load_config(file)
    except UsageError as error:
        paragraph(str(error), key)
    else:
        file.write_text(dump_config(config), encoding="utf-8")
        assert load_config(file) == config


@settings(CORPUS, max_examples=200)
@given(content=st.binary(max_size=60) | st.text("{}[]:,-&*!|>#?%@'\"\\ \t\nab1.~", max_size=40).map(str.encode))
def test_any_bytes_are_a_config_or_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    try:
        assert isinstance(load_config(file), Config)
    except UsageError as error:
        paragraph(str(error), str(file))


GOOD = jsonl(ROWS[:6])
ROW = st.fixed_dictionaries({}, optional={"question": JSON, "answer": JSON, "more": JSON})


@st.composite
def spoilt(draw: st.DrawFn, good: bytes, head: int) -> bytes:
    """The bytes with one changed, one more or one less, or cut; half of the places lie in the first `head`."""
    place = draw(st.integers(0, head - 1) | st.integers(0, len(good) - 1))
    how, byte = draw(st.sampled_from(["change", "insert", "drop", "cut"])), bytes([draw(st.integers(0, 255))])
    rest = {"change": byte + good[place + 1 :], "insert": byte + good[place:], "drop": good[place + 1 :], "cut": b""}
    return good[:place] + rest[how]


@settings(CORPUS, max_examples=120)
@given(
    content=spoilt(GOOD, len(GOOD))
    | st.lists(ROW, max_size=4).map(jsonl)
    | st.lists(JSON, max_size=3).map(lambda values: "\n".join(json.dumps(value) for value in values).encode())
    | st.binary(max_size=40)
)
@example(content=b"null\n")
def test_any_bytes_are_a_dataset_or_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    """In this process: pyarrow crashes of some bytes, which no test could miss."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    try:
        problems, bad = load_source(Source(str(file)))
    except DatasetError as error:
        paragraph(str(error), str(file))
    else:
        assert all(problem.question.strip() and problem.answer.strip() for problem in problems)
        assert all(str(row).isprintable() for row in bad)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("good"), hidden_size=32, layers=1)


HEADS = {"model.safetensors": 1300, "config.json": 700, "tokenizer.json": 1000, "tokenizer_config.json": 300}


@pytest.mark.parametrize("name", HEADS)
def test_a_spoilt_file_of_a_model_is_refused_or_the_model_still_works(name: str, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    good = (model / name).read_bytes()
    taken: list[bool] = []

    @settings(CORPUS, max_examples=100)
    @given(content=spoilt(good, HEADS[name]))
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        taken.append(works(folder))

    check()
    assert any(taken) and not all(taken)


def works(folder: Path) -> bool:
    """Whether the folder is taken; it then loads, or its weights are named as no numbers. False: refused by name."""
    try:
        found = find_here(Model(name=str(folder)))
        assert found is not None
        check_template(found.tokenizer, Template())
    except (ModelError, DatasetError) as error:
        paragraph(str(error))
        return False
    try:
        load_policy(folder, "float32", 64, False)
    except RunError as error:
        paragraph(str(error))
    return True
