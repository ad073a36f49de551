"""A user's mistake ends before anything starts: exit code 2, and one paragraph with cause and fix."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from cluster.train import main
from tests.bad_corpus import CAUSES, ROWS, Case, Cause, Place, Plant, data, file, given, jsonl, model, small, without
from tests.small_run import ROOT
from tests.tiny import tiny_llama

CASES = [
    pytest.param(cause, case, id=f"{cause.name}-{number}")
    for cause in CAUSES
    for number, case in enumerate(cause.cases, start=1)
]


@pytest.fixture(scope="session")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the corpus spoils copies of: a random Llama of 20,000 weights."""
    return tiny_llama(tmp_path_factory.mktemp("good"), hidden_size=32, layers=1)


@pytest.fixture
def place(good_model: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, good_model)


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len({cause.name for cause in CAUSES}) == len(CAUSES) >= 40
    assert all(1 <= len(cause.cases) <= 5 and cause.says for cause in CAUSES)


@pytest.mark.parametrize(("cause", "case"), CASES)
def test_a_mistake_is_refused_with_cause_and_fix(
    cause: Cause, case: Case, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = case.plant(place)
    with rights_bind() if cause.rights else nullcontext():
        code = main([*argv, "--dry-run"])
    message = capfd.readouterr().err
    assert code == 2, message
    helps(message)
    missing = [words for words in (*cause.says, *case.says) if words not in message]
    assert not missing, f"{missing} not in: {message}"
    assert not (place.folder / "runs").exists()


def helps(message: str) -> None:
    """One paragraph in sentences, printable, and no exception's text alone."""
    assert message.startswith("error: ") and message.endswith((".\n", "?\n", ")\n")), message
    text = message.removesuffix("\n")
    assert text.isprintable() and "Traceback" not in text, message
    assert not text.endswith(("..", "?.", "!.")) and len(text.split()) >= 8, message


@contextmanager
def rights_bind() -> Iterator[None]:
    """Within, the rights of files hold for root too: the capabilities to pass over them are put down for a moment."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: of capabilities 0 to 31, then of 32 to 63
    assert libc.capget(header, before) == 0
    fewer = (ctypes.c_uint32 * 6)(*before)
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


ACCEPTED: dict[str, Plant] = {
    "a config with a byte order mark": lambda place: small(
        place, *file("x.yaml", "\ufefftraining: {steps: 3}\n", "--config={folder}/x.yaml")(place)[-1:]
    ),
    "a config with the line ends of Windows": lambda place: small(
        place, *file("x.yaml", "training:\r\n  steps: 3\r\n", "--config={folder}/x.yaml")(place)[-1:]
    ),
    "the same override twice": given("training.steps=3", "training.steps=5"),
    "a dataset with a byte order mark": data(b"\xef\xbb\xbf" + jsonl(ROWS)),
    "a dataset with the line ends of Windows": data(jsonl(ROWS).replace(b"\n", b"\r\n")),
    "numbers as answers, some as text": data([*ROWS, {"question": "How many?", "answer": 5}]),
    "many braces in a question": data([*ROWS, {"question": "{[" * 99, "answer": "5"}]),
    "a good model": model(lambda folder: None),
    "a model without a pad token": model(lambda folder: _without_pad(folder)),
    "a base model without a chat template": lambda place: [
        *without("chat_template.jinja")(place),
        "data.chat_template=none",
    ],
}


def _without_pad(folder: Path) -> None:
    """Nothing pads with it: vLLM takes lists of ids, and the learner's padding is never attended to."""
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        lines = (folder / name).read_text().split("\n")
        (folder / name).write_text("\n".join(line for line in lines if "pad_token" not in line))


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_only_looks_like_a_mistake_is_taken(name: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    code = main([*ACCEPTED[name](place), "--dry-run"])
    assert code == 0, capfd.readouterr().err
