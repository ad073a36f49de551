"""A user's mistake ends before anything starts: exit code 2, and one paragraph with cause and fix."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from cluster.ray_access import check_token
from cluster.train import main
from configs.errors import RunError, UsageError
from configs.schema import Model
from learner.policy import load_policy
from learner.pretrained import find_here
from tests.bad_corpus import (
    CAUSES,
    ROWS,
    Case,
    Cause,
    Place,
    Plant,
    config,
    data,
    given,
    json_with,
    jsonl,
    model,
    tensors,
    without,
)
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
    "a config with a byte order mark": config("\ufefftraining: {steps: 3}\n"),
    "a config with the line ends of Windows": config("training:\r\n  steps: 3\r\n"),
    "the same override twice": given("training.steps=3", "training.steps=5"),
    "a dataset with a byte order mark": data(b"\xef\xbb\xbf" + jsonl(ROWS)),
    "a dataset with the line ends of Windows": data(jsonl(ROWS).replace(b"\n", b"\r\n")),
    "numbers as answers, some as text": data([*ROWS, {"question": "How many?", "answer": 5}]),
    "many braces in a question": data([*ROWS, {"question": "{[" * 99, "answer": "5"}]),
    "a good model": model(lambda folder: None),
    "a model without a pad token": model(lambda folder: _without_pad(folder)),
    "a model whose pad token is none, in an old way": json_with("config.json", pad_token_id=-1),
    "a model whose pad token is its last": json_with("config.json", pad_token_id=106),
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


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named_where_they_are_read(number: float, place: Place) -> None:
    """Not before: finding them would mean to read the weights twice."""
    folder = Path(tensors(lambda found: found["model.norm.weight"].__setitem__(3, number))(place)[-1].partition("=")[2])
    assert find_here(Model(name=str(folder))) is not None
    with pytest.raises(RunError, match=r"tensor model\.norm\.weight in .* has 1 of 32 numbers .* anew") as raised:
        load_policy(folder, "float32", 64, False)
    helps(f"error: {raised.value}\n")


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "127.0.0.1:1", "not an address", "nobody.invalid:6379"])
def test_a_ray_address_where_nobody_answers_is_named_in_time(address: str) -> None:
    """A port that is open and silent is the worst: whoever connects waits for its first word."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        named = address.format(port=silent.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(UsageError, match=f"RAY_ADDRESS={re.escape(named)} within 1 s") as raised:
            check_token(named, seconds=1.0)
    assert time.monotonic() - began < 10
    helps(f"error: {raised.value}\n")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["learner.completions_per_update=7"], "does not divide"),
        (["--config", "quikstart"], "quickstart"),
        (["--resume", "runs/none"], "no run to resume"),
        (["training.steps=2"], "unset RAY_ADDRESS"),
    ],
)
def test_the_real_command_ends_with_code_2_and_nothing_but_the_message(
    argv: list[str], says: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "run_local.py"), *argv]
    environment = {**os.environ, "RAY_ADDRESS": "http://127.0.0.1:8265"}  # asked only when all else is well
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    helps(done.stderr)
    assert not os.listdir(tmp_path)
