"""Claims about benchmarks/harness.py: what is counted, how pairs are formed, what a recorded line holds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import harness


def test_warm_up_calls_run_and_are_not_counted() -> None:
    calls: list[int] = []

    def first_calls_are_slow() -> None:
        calls.append(1)
        time.sleep(0.05 if len(calls) <= 2 else 0)

    sample = harness.measure(first_calls_are_slow, repeats=3, warmup=2)
    assert len(calls) == 5
    assert len(sample.values) == 3
    assert sample.max < 0.05


def test_a_sample_gives_min_median_and_max_of_all_values() -> None:
    sample = harness.Sample((3.0, 1.0, 8.0, 2.0))
    assert (sample.min, sample.median, sample.max) == (1.0, 2.5, 8.0)
    assert sample.figures()["values"] == [3.0, 1.0, 8.0, 2.0]


def test_no_repeats_is_an_error_not_an_empty_figure() -> None:
    with pytest.raises(ValueError, match="at least one repeat"):
        harness.measure(lambda: None, repeats=0)


def test_a_comparison_alternates() -> None:
    order: list[str] = []
    harness.compare(lambda: order.append("a"), lambda: order.append("b"), repeats=3, warmup=1)
    assert "".join(order) == "ab" * 4


def test_the_ratio_is_taken_within_pairs_so_drift_cancels() -> None:
    # The machine slows down tenfold half-way; b always takes twice as long as the a before it.
    drifting = harness.Comparison(a=harness.Sample((1.0, 1.0, 10.0)), b=harness.Sample((2.0, 2.0, 20.0)))
    assert drifting.ratio.values == (2.0, 2.0, 2.0)


def test_the_hardware_is_described_without_importing_what_it_describes() -> None:
    code = (
        "import sys; from benchmarks import harness; facts = harness.hardware();"
        "print(facts['versions']['torch'], facts['versions']['vllm'],"
        "      sorted({'torch', 'vllm', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    torch_version, vllm_version, imported = done.stdout.strip().split(" ", 2)
    assert imported == "[]"
    assert "None" not in (torch_version, vllm_version)
    facts = harness.hardware()
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert facts["cpu"]


def test_a_recorded_line_says_when_where_and_by_which_command(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    harness.record("first", {"seconds": 1.5}, path)
    harness.record("second", {"seconds": 2.5}, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    figures = [(line["name"], line["figures"]["seconds"]) for line in lines]
    assert figures == [("first", 1.5), ("second", 2.5)]
    assert lines[0]["time"].endswith("+00:00")
    assert "pytest" in lines[0]["command"]
    assert lines[0]["hardware"] == harness.hardware()
    assert set(lines[0]["commit"]) == {"hash", "dirty"}


def test_a_figure_that_is_no_number_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="JSON compliant"):
        harness.record("broken", {"seconds": float("nan")}, path)
    assert not path.exists()


def test_the_command_line_compares_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    arguments = ["true", "sleep 0.2", "--repeats", "2", "--warmup", "0", "--record", "sleep"]
    assert harness.main([*arguments, "--path", str(path)]) == 0
    assert "b/a" in capsys.readouterr().out
    assert json.loads(path.read_text())["figures"]["b_over_a"]["min"] > 1


def test_a_command_that_fails_is_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert harness.main(["false", "--record", "no", "--path", str(path)]) == 1
    assert not path.exists()
