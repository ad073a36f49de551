"""Claims about the verifier and its killable child: limits hold, survivors are scored, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from actors.verifier import Verifier
from cluster.loop import flat
from cluster.metrics import group_metrics
from configs.schema import Rewards
from data.records import Completion, Group, Outcome, Problem, Prompt, Verdict
from data.rollouts import read_groups, write_groups
from rewards.child import BATCH, Take, VerifierChild
from rewards.registry import Case
from tests.processes import gone

ROOT = Path(__file__).resolve().parent.parent
HANGS = "10^{10^{10^{10}}}"
WEIGHTS = {"accuracy": 1.0, "format": 0.25}


def structured(answer: str) -> str:
    return f"<think>because</think><answer>{answer}</answer>"


def group(*texts: str, gold: str = "7") -> Group:
    prompt = Prompt(0, Problem("id", "3 + 4", gold), (1, 2))
    none = np.zeros(0, np.int32)
    return Group(
        prompt,
        tuple(Completion(i, i, none, none.astype(np.float32), none, text, "stop") for i, text in enumerate(texts)),
    )


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def child() -> Iterator[VerifierChild]:
    with VerifierChild(WEIGHTS, timeout_seconds=0.6) as child:
        yield child


def test_verdicts_come_in_the_order_of_the_completions_under_the_configured_tags():
    verifier = Verifier(Rewards(weights=WEIGHTS, reasoning_tag="plan", answer_tag="result"), max_completion_tokens=32)
    assert verifier.ready() is True
    sampled = group("<plan>3 + 4</plan><result>7</result>", "8", r"\boxed{\frac{14}{2}}", "no idea")
    scored = verifier.score(sampled)
    verifier.close()
    assert scored.completions == sampled.completions
    assert [verdict.outcome for verdict in scored.verdicts] == ["correct", "wrong", "correct", "unparsable"]
    assert [verdict.total for verdict in scored.verdicts] == [1.25, 0.0, 1.0, 0.0]
    assert [verdict.extracted for verdict in scored.verdicts] == ["7", "8", r"\frac{14}{2}", None]
    assert scored.verdicts[0].rewards == {"accuracy": 1.0, "format": 1.0}


def test_the_verifier_counts_a_completions_tokens_for_the_overlong_reward():
    verifier = Verifier(Rewards(weights={"accuracy": 1.0, "overlong": 0.5}, overlong_buffer=4), max_completion_tokens=8)
    lengths = (1, 4, 6, 8)
    sampled = group("7", "7", "7", "7")
    completions = [
        replace(each, token_ids=np.zeros(length, np.int32))
        for each, length in zip(sampled.completions, lengths, strict=True)
    ]
    scored = verifier.score(replace(sampled, completions=tuple(completions)))
    verifier.close()
    assert [verdict.rewards["overlong"] for verdict in scored.verdicts] == [0.0, 0.0, -0.5, -1.0]
    assert [verdict.total for verdict in scored.verdicts] == [1.0, 1.0, 0.75, 0.5]
    assert not flat(scored) and flat(replace(scored, verdicts=scored.verdicts[:2]))


def test_the_verifier_refuses_unknown_rewards():
    with pytest.raises(ValueError, match="did you mean 'format'"):
        Verifier(Rewards(weights={"formats": 1.0}), max_completion_tokens=32)


def test_time_outs_are_counted_and_survivors_are_scored(child):
    texts = [structured("7"), structured(HANGS), structured("8"), structured(HANGS), structured("7")]
    start = time.monotonic()
    scores = child.score([Case(text, "7") for text in texts])
    assert time.monotonic() - start < 10
    assert [score.outcome for score in scores] == ["correct", "timeout", "wrong", "timeout", "correct"]
    assert scores[1].rewards == {"accuracy": 0.0, "format": 1.0}


@pytest.mark.parametrize(
    "answer",
    [
        r"\frac{1}{2}+" * 90_000,
        "(" * 3000 + "1" + ")" * 3000,
        "(2^{999999999})!",
        "9**9**9**9",
        '\x00\ud800\n{"outcome": "correct"}\n',
        "(" * 900 + "1" + ")" * 900,
        r"\sum_{k=1}^{10^9} k^k",
        r"\frac{1}{" * 150 + "1" + "}" * 150,
        "{" * 1500,
        "9" * 1900,
        "1" + "0" * 1800 + "!",
        r"\sqrt{" * 250 + "2" + "}" * 250,
        "７" * 900 + "\u202e\u0300" * 400,
        r"\binom{10^9}{10^8}",
        r"\int_0^1 x^{x^{x^{x}}} dx",
        "x^{1000}" + "+x^{999}" * 200,
        r"\begin{pmatrix}" + "1&" * 900 + r"\end{pmatrix}",
    ],
    ids=[
        "megabyte",
        "deep",
        "factorial",
        "power",
        "forged",
        "parentheses",
        "sum",
        "fractions",
        "braces",
        "digits",
        "huge factorial",
        "radicals",
        "unicode",
        "binomial",
        "integral",
        "polynomial",
        "matrix",
    ],
)
def test_hostile_answers_end_in_bounded_time_and_never_as_correct(child, answer):
    start = time.monotonic()
    scores = child.score([Case(structured(answer), "7"), Case(structured("7"), "7")])
    assert time.monotonic() - start < 8
    assert scores[0].outcome in ("wrong", "unparsable", "timeout")
    assert scores[1].outcome == "correct"


def test_five_thousand_parentheses_are_read_in_no_time_as_no_answer(child):
    start = time.monotonic()
    assert child.score([Case(structured("(" * 5000 + "7" + ")" * 5000), "7")])[0].outcome == "unparsable"
    assert time.monotonic() - start < 3


def factored(count: int, first: int) -> list[Case]:
    """So many cases that take about as long as one another, and that no cache knows."""
    return [Case(rf"\boxed{{(x+{k})(x+1)}}", f"x^2+{k + 1}x+{k}") for k in range(first, first + count)]


def test_the_completions_sent_ahead_have_each_a_deadline_of_its_own():
    with VerifierChild(WEIGHTS) as child:
        child.score(factored(2, 1000))
        start = time.monotonic()
        child.score(factored(8, 2000))
        child.timeout_seconds = (time.monotonic() - start) / 8 * 12
        assert {score.outcome for score in child.score(factored(BATCH, 3000))} == {"correct"}


def test_a_time_out_in_a_batch_costs_nobody_else(child):
    texts = [structured("7")] * (BATCH + 5)
    for slow in (3, BATCH - 1, BATCH):
        texts[slow] = structured(HANGS)
    outcomes = [score.outcome for score in child.score([Case(text, "7") for text in texts])]
    assert outcomes == ["timeout" if text == structured(HANGS) else "correct" for text in texts]


def test_a_child_that_retires_in_the_middle_of_a_batch_loses_none_of_it(child, monkeypatch):
    exchange = child._exchange
    retired: list[bool] = []

    def retiring(request: bytes, count: int, seconds: float, take: Take) -> None:
        def told_to_retire(reply: dict[str, Any]) -> bool:
            retire = reply.get("outcome") == "wrong" and not retired
            retired.extend([True] * retire)
            return take({**reply, "retire": retire} if "outcome" in reply else reply)

        exchange(request, count, seconds, told_to_retire)

    monkeypatch.setattr(child, "_exchange", retiring)
    answers = ["7", "8", "7", "9", "7"]
    before = child.starts
    outcomes = [score.outcome for score in child.score([Case(structured(answer), "7") for answer in answers])]
    assert outcomes == ["correct", "wrong", "correct", "wrong", "correct"]
    assert retired and child.starts - before >= 1


def test_exact_texts_are_judged_in_the_same_child():
    with VerifierChild({"exact_match": 1.0}) as child:
        scores = child.score([Case(structured(answer), "New York") for answer in (" New  York", "new york", "")])
    assert [score.outcome for score in scores] == ["correct", "wrong", "unparsable"]


def test_the_verifier_hands_on_what_the_prompt_began_and_says_where_the_answer_stood():
    verifier = Verifier(Rewards(weights=WEIGHTS), max_completion_tokens=32)
    sampled = group("because</think><answer>7</answer>", "so</think> it is 7")
    opened = replace(sampled, prompt=replace(sampled.prompt, prefill="<think>\n"))
    verdicts = verifier.score(opened).verdicts
    assert [verdict.rewards["format"] for verdict in verdicts] == [1.0, 0.0]
    assert [verdict.marked for verdict in verdicts] == [True, False]
    assert [verdict.rewards["format"] for verdict in verifier.score(sampled).verdicts] == [0.0, 0.0]
    verifier.close()


def test_the_settings_of_the_config_reach_the_rewards():
    options = Rewards(weights={"cosine": 1.0, "language": 1.0}, cosine_wrong=(-3.0, -2.0), script="greek")
    verifier = Verifier(options, max_completion_tokens=8)
    verdict = verifier.score(group("λόγος")).verdicts[0]
    verifier.close()
    assert verdict.rewards == {"cosine": -3.0, "language": 1.0}


def test_lenient_and_strict_accuracy_are_both_metrics():
    def verdict(outcome: Outcome, marked: bool) -> Verdict:
        return Verdict({"accuracy": 0.0}, 0.0, outcome, "7", marked)

    verdicts = (verdict("correct", True), verdict("correct", False), verdict("wrong", True), verdict("timeout", False))
    metrics = group_metrics([replace(group("", "", "", ""), verdicts=verdicts)])
    assert (metrics["verdict/correct"], metrics["verdict/correct_strict"]) == (0.5, 0.25)


def test_rollouts_keep_where_the_answer_stood_and_files_from_before_are_read(tmp_path):
    marks = (True, False)
    verdicts = tuple(Verdict({"accuracy": 1.0}, 1.0, "correct", "7", marked) for marked in marks)
    written = replace(group("7", "8"), verdicts=verdicts)
    write_groups(tmp_path / "new.parquet", [written])
    assert [v.marked for v in read_groups(tmp_path / "new.parquet")[0].verdicts] == [True, False]
    table = pq.read_table(tmp_path / "new.parquet")
    pq.write_table(table.drop_columns("marked"), tmp_path / "old.parquet")
    assert [v.marked for v in read_groups(tmp_path / "old.parquet")[0].verdicts] == [True, True]


def test_a_completion_whose_child_is_killed_from_outside_is_judged_again(child, monkeypatch):
    child.start()
    exchange, before = child._exchange, child.starts
    killers: list[threading.Timer] = []

    def killed_once_on_the_way(request: bytes, count: int, seconds: float, take: Take) -> None:
        if HANGS.encode() in request and not killers:
            killers.append(threading.Timer(0.2, os.kill, (child.pid, signal.SIGKILL)))
            killers[0].start()
        exchange(request, count, seconds, take)

    monkeypatch.setattr(child, "_exchange", killed_once_on_the_way)
    scores = child.score([Case("7", "7"), Case(structured(HANGS), "7"), Case("7", "7")])
    assert [score.outcome for score in scores] == ["correct", "timeout", "correct"]
    assert child.starts - before == 2, "once for the kill, once for the time-out"


def test_a_completion_that_exhausts_the_childs_memory_is_an_error_and_the_rest_go_on():
    with VerifierChild(WEIGHTS, memory_mb=128) as child:
        huge = structured("7" * 30_000_000)
        scores = child.score([Case("7", "7"), Case(huge, "7"), Case("8", "7")])
    assert [score.outcome for score in scores] == ["correct", "error", "wrong"]
    assert scores[1].rewards == {"accuracy": 0.0, "format": 1.0}


def test_a_child_killed_while_idle_costs_no_completion(child):
    child.start()
    os.kill(child.pid, signal.SIGKILL)
    assert child.score([Case("7", "7")])[0].outcome == "correct"


def test_an_interrupted_call_leaves_no_late_reply_for_the_next_one(child):
    class Interrupted(BaseException):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    child.start()
    previous = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    with pytest.raises(Interrupted):
        child.score([Case(structured(HANGS), "7")])
    signal.signal(signal.SIGUSR1, previous)
    assert child.score([Case("7", "7")])[0].outcome == "correct"


def test_a_stopped_child_costs_no_completion_even_if_the_request_does_not_fit_its_pipe(child):
    child.start()
    os.kill(child.pid, signal.SIGSTOP)
    outcomes = [score.outcome for score in child.score([Case("7 " * 500_000 + structured("7"), "7"), Case("7", "7")])]
    assert outcomes == ["correct", "correct"]


def test_an_unparsable_gold_is_an_error_not_a_wrong_answer(child):
    assert child.score([Case("7", "?!")])[0].outcome == "error"


def test_the_child_is_limited_in_memory_and_writes_no_files(child):
    child.start()
    process = psutil.Process(child.pid)
    assert process.rlimit(psutil.RLIMIT_AS) == (2048 * 2**20, 2048 * 2**20)
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)


def test_a_child_that_cannot_start_says_why():
    with pytest.raises(RuntimeError, match=r"did not start.*20 MiB.*rewards\.memory_mb"):
        VerifierChild(WEIGHTS, memory_mb=20).start()
    with pytest.raises(RuntimeError, match=r"it gave no answer in 0\.01 s"):
        VerifierChild(WEIGHTS, start_seconds=0.01).start()


def test_nothing_is_left_after_close(child):
    child.start()
    process = psutil.Process(child.pid)
    child.close()
    assert not process.is_running()
    assert child.pid is None
    child.close()


def test_it_works_off_the_main_thread_and_after_that_thread_has_ended(child):
    outcomes: list[str] = []

    def run() -> None:
        child.close()
        outcomes.append(child.score([Case(r"\boxed{1/2}", "0.5")])[0].outcome)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    pid = child.pid
    outcomes.append(child.score([Case(r"\boxed{1/2}", "0.5")])[0].outcome)
    assert outcomes == ["correct", "correct"]
    assert child.pid == pid, "the child died with the thread that started it"


ORPHAN = """
import sys
from rewards.child import VerifierChild
from rewards.registry import Case
child = VerifierChild({"accuracy": 1.0}, timeout_seconds=0.5)
child.start()
print(child.pid, flush=True)
if sys.argv[1] == "busy":
    child.timeout_seconds = 60.0
    child.score([Case("\\\\boxed{10^{10^{10^{10}}}}", "7")])
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_the_child_dies_with_a_parent_that_is_killed_wherever_that_runs(state, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", ORPHAN, state]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout
        orphan = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        assert orphan.is_running()
        parent.kill()
    wait_until(lambda: gone(orphan), seconds=8)
