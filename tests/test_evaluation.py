"""The parts of an evaluation without Ray: scores, folders, tables, pages, command line, benchmarks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cluster.tasks import evaluation_config, template_of
from configs.errors import UsageError
from data.errors import DatasetError
from data.records import Problem
from evaluation.benchmarks import Benchmark, limited, load_benchmark, with_examples, with_own_ids, worked_answer
from evaluation.command_line import parse_request
from evaluation.problem_results import ProblemResult, from_line, to_line
from evaluation.report import Report, Task, tables, to_json, to_markdown
from evaluation.report_page import to_html
from evaluation.results_folder import ResultsFolder, differences
from evaluation.scores import compare, figures_of, ks, score
from rewards.gold_check import gold_check
from tests.evaluation_cases import result, sample, write_problems

SETTINGS = {
    "samples": 2, "temperature": 0.6, "top_p": 0.95, "max_completion_tokens": 64, "dtype": "float32", "seed": 0,
    "split": "test", "limit": None,
}  # fmt: skip
RIGHT, UNMARKED, WRONG = sample(), sample(marked=False), sample("wrong", extracted="8", tokens=30)
NOTHING = sample("unparsable", extracted=None, marked=False, tokens=64, truncated=True)


def test_strict_accuracy_counts_only_answers_that_stand_where_they_were_asked_for() -> None:
    found = score([figures_of(each) for each in (result("a", RIGHT, UNMARKED), result("b", UNMARKED, WRONG))])
    assert (found.lenient.value, found.strict.value) == (0.75, 0.25)


def test_a_score_has_lengths_truncation_outcomes_and_votes() -> None:
    found = score([figures_of(each) for each in (result("a", RIGHT, NOTHING), result("b", RIGHT, WRONG))])
    assert found.length == (10 + 64 + 10 + 30) / 4 and found.length_p90 == pytest.approx(53.8)
    assert found.truncated == 0.25
    assert found.outcomes == {"correct": 0.5, "wrong": 0.25, "unparsable": 0.25, "timeout": 0.0, "error": 0.0}
    assert found.majority is not None and found.majority.value == 0.75 and found.tied == 0.5
    assert found.pass_at[2].value == 1.0


def test_pass_at_k_is_reported_for_powers_of_two_and_all_samples() -> None:
    assert (ks(1), ks(2), ks(6), ks(16)) == ([], [2], [2, 4, 6], [2, 4, 8, 16])


def test_only_results_of_the_same_problems_are_compared() -> None:
    ours = [figures_of(result("a", RIGHT)), figures_of(result("b", WRONG))]
    with pytest.raises(ValueError, match="same problems"):
        compare(ours, ours[::-1])
    with pytest.raises(ValueError, match="samples"):
        compare(ours, [figures_of(result(identity, RIGHT, RIGHT)) for identity in "ab"])


def test_a_result_comes_back_from_its_line_whatever_the_model_wrote() -> None:
    hostile = result("a", sample(text='\u2028"\n</pre>\ud800\x00', extracted="é"), question="line\nline")
    line = to_line(hostile)
    assert line.count("\n") == 1 and from_line(line) == hostile


def test_a_line_cut_off_by_a_kill_is_taken_away_and_the_rest_counts(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.append("t", [result("a", RIGHT), result("b", WRONG)])
    whole = folder.lines("t").read_bytes()
    folder.lines("t").write_bytes(whole + to_line(result("c", RIGHT)).encode()[:-9])
    assert folder.done("t") == {"a", "b"} and folder.lines("t").read_bytes() == whole


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.append("t", [result("a", RIGHT)])
    with folder.lines("t").open("a") as out:
        out.write('{"id": "b"}\n')
    with pytest.raises(UsageError, match=r"Line 2 of .*t\.jsonl"):
        folder.done("t")


def test_lines_are_put_in_the_order_of_the_problems(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.append("t", [result(identity, RIGHT, question="long " * number) for number, identity in enumerate("cab")])
    folder.put_in_order("t", ["a", "b", "c"])
    assert [each.id for each in folder.results("t")] == ["a", "b", "c"]
    assert [each.id for each in folder.first("t", 2)] == ["a", "b"]


def test_settings_that_differ_are_named_and_places_are_not() -> None:
    ours = {"model": "here", "seed": 1, "tasks": {"a": {"of": 3}}}
    assert differences(ours, {**ours, "model": "there"}) == []
    assert differences(ours, {**ours, "seed": 2}) == ["seed is 1 here and 2 there"]
    assert differences(ours, {**ours, "tasks": {}}) == ["tasks.a.of is 3 here and 'absent' there"]


def report(*results: ProblemResult, left_out: tuple[str, ...] = ()) -> Report:
    task = Task("t", score([figures_of(each) for each in results]), of=9, few_shot=0, left_out=left_out)
    return Report("model", SETTINGS, (task,))


def test_tables_say_how_many_of_how_many_problems_were_asked() -> None:
    markdown = to_markdown(report(result("a", RIGHT, WRONG)))
    assert "| t | 1 of 9 | 0 | 50.0 [" in markdown
    assert "2 samples a problem at temperature 0.6" in markdown


def test_every_row_has_a_cell_for_every_column() -> None:
    for table in tables(report(result("a", RIGHT, WRONG))):
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_programs_have_no_majority_and_leave_their_cells_empty() -> None:
    figures = [figures_of(result("a", RIGHT, WRONG))]
    programs, answers = (Task(str(voted), score(figures, voted=voted), 1, 0) for voted in (False, True))
    accuracy, _ = tables(Report("model", SETTINGS, (programs, answers)))
    assert programs.score.majority is None and accuracy.rows[0][-2:] == ("–", "–")
    assert {len(row) for row in accuracy.rows} == {len(accuracy.header)}


def test_what_a_model_wrote_is_escaped_on_the_page() -> None:
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"
    results = [result("a", sample("wrong", text=attack, extracted=attack), sample(), question=attack, gold=attack)]
    page = to_html(replace(report(*results, left_out=(attack,)), model=attack), {"t": results})
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert "default-src 'none'" in page


def test_a_pipe_or_a_tag_in_a_name_breaks_no_markdown_table() -> None:
    found = to_markdown(replace(report(result("a", RIGHT, WRONG), left_out=("a | b\n<b>",)), model="m|<i>"))
    assert "- t: a \\| b &lt;b>" in found and "# Evaluation of m\\|&lt;i>" in found


def test_the_report_is_json_without_rounding() -> None:
    found = json.loads(json.dumps(to_json(report(result("a", RIGHT, WRONG), result("b", WRONG, WRONG)))))
    assert found["tasks"][0]["score"]["lenient"]["value"] == 0.25


def arguments(*more: str) -> list[str]:
    return ["--model", "m", "--tasks", "gsm8k,math500", *more]


def test_the_command_line_becomes_a_record() -> None:
    found = parse_request(arguments("--few-shot", "gsm8k=5", "--limit", "7", "model.dtype=bfloat16"), "evaluate")
    assert (found.tasks, found.few_shot, found.limit) == (("gsm8k", "math500"), {"gsm8k": 5}, 7)
    assert (found.temperature, found.top_p, found.samples, found.split) == (0.6, 0.95, 1, "test")
    assert found.overrides == ("model.dtype=bfloat16",)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tasks", "gsm8"), "Did you mean gsm8k"),
        (("--tasks", ","), "names none"),
        (("--tasks", "train"), "--config"),
        (("--few-shot", "aime24=3"), "TASK=COUNT"),
        (("--few-shot", "gsm8k=many"), "TASK=COUNT"),
        (("--samples", "0"), "from 1 up"),
        (("--samples", "4", "--temperature", "0"), "greedy"),
        (("--temperature", "nan"), "from 0 up"),
        (("--top-p", "1.5"), "at most 1"),
        (("--limits", "3"), "--help"),
        (("cluster.rollout_workers=4",), "give --workers 4"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(more: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_request(arguments(*more), "evaluate")


def test_a_limit_takes_the_same_problems_whatever_their_order_and_others_with_another_seed() -> None:
    problems = tuple(Problem(str(number), f"q{number}", "1") for number in range(50))
    chosen = limited(Benchmark("t", problems, 50), 10, seed=0).problems
    assert limited(Benchmark("t", problems[::-1], 50), 10, seed=0).problems == chosen
    assert limited(Benchmark("t", problems, 50), 20, seed=0).problems[:10] == chosen
    assert set(limited(Benchmark("t", problems, 50), 10, seed=1).problems) != set(chosen)
    assert limited(Benchmark("t", problems, 50), 50, seed=0).problems == problems


def test_a_question_that_stands_there_twice_counts_twice() -> None:
    problems = [Problem("a", "q", "1"), Problem("b", "p", "1"), Problem("a", "q", "1")]
    assert [problem.id for problem in with_own_ids(problems)] == ["a", "b", "a-2"]


def test_rows_whose_gold_cannot_be_scored_are_left_out_and_named(tmp_path: Path) -> None:
    write_problems(tmp_path, count=3)
    with (tmp_path / "gsm8k_test.jsonl").open("a") as out:
        out.write(json.dumps({"question": "Which?", "answer": "np.arcsin(10/13)"}) + "\n")
    found = load_benchmark("gsm8k", "test", tmp_path)
    assert (len(found.problems), found.of) == (3, 4)
    (row,) = found.left_out
    assert "row 4" in row and "np.arcsin" in row


def test_a_benchmark_whose_golds_explode_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.gold_check.MAX_SLOW", 1)
    monkeypatch.setattr("evaluation.benchmarks.gold_check", partial(gold_check, timeout_seconds=0.5))
    row = {"question": "How many?", "answer": r"\binom{1000000000}{500000000}"}
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=r"gsm8k_test\.jsonl: 1 gold answers take too long"):
        load_benchmark("gsm8k", "test", tmp_path)


def with_solutions(folder: Path) -> Path:
    write_problems(folder, "gsm8k_test", count=4)
    solution = "1 and 4 are <<1+4=5>>5.\n#### 5"
    rows = [{"question": "1 + 4", "answer": "5", "answer_official": solution}] * 3
    (folder / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_examples_are_training_problems_without_the_datasets_marks_and_are_not_asked(tmp_path: Path) -> None:
    benchmark = load_benchmark("gsm8k", "test", with_solutions(tmp_path))
    asked = replace(benchmark, problems=(*benchmark.problems, *load_benchmark("gsm8k", "train", tmp_path).problems[:1]))
    found = with_examples(asked, 2, tmp_path)
    assert [worked_answer(example, None) for example in found.examples] == ["1 and 4 are 5.\n\n\\boxed{5}"] * 2
    tagged = worked_answer(found.examples[0], ("think", "answer"))
    assert tagged == "<think>1 and 4 are 5.</think><answer>5</answer>"
    assert found.problems == benchmark.problems


def test_examples_answer_as_the_template_asks_the_model_to(tmp_path: Path) -> None:
    benchmark = with_examples(load_benchmark("gsm8k", "test", with_solutions(tmp_path)), 1, tmp_path)
    boxed = evaluation_config(parse_request(arguments(), "evaluate"))
    tagged = evaluation_config(
        parse_request(arguments("data.user_prompt=Answer in <answer> tags: {question}"), "evaluate")
    )
    assert template_of(boxed, benchmark).few_shot == (("1 + 4", "1 and 4 are 5.\n\n\\boxed{5}"),)
    assert template_of(tagged, benchmark).few_shot[0][1].endswith("<answer>5</answer>")
    assert template_of(boxed, replace(benchmark, examples=())).few_shot == ()


def test_programs_are_asked_for_in_words_of_their_own_unless_a_config_says_how() -> None:
    task = Benchmark("mbpp", (Problem("a", "q", "assert f() == 1"),), 1, "code")
    ours = evaluation_config(parse_request(arguments(), "evaluate"))
    theirs = evaluation_config(parse_request(arguments("--config", "quickstart"), "evaluate"))
    assert "Python" in template_of(ours, task).user_prompt and "boxed" not in template_of(ours, task).user_prompt
    assert template_of(theirs, task).user_prompt == "{question}"


def test_the_config_is_the_recipes_or_that_of_the_run_a_checkpoint_stands_in(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("data: {user_prompt: 'Say {question}'}\n")
    for named in (checkpoint, tmp_path / "run"):
        config = evaluation_config(parse_request(arguments("--config", str(named)), "evaluate"))
        assert config.data.user_prompt == "Say {question}"
    recipe = parse_request(arguments("--config", "quickstart", "--max-completion-tokens", "99"), "evaluate")
    assert evaluation_config(recipe).rollout.max_completion_tokens == 99
    with pytest.raises(UsageError, match=r"no config\.yaml"):
        evaluation_config(parse_request(arguments("--config", str(tmp_path)), "evaluate"))


def test_a_benchmark_without_training_problems_or_with_too_few_has_no_examples(tmp_path: Path) -> None:
    write_problems(tmp_path, "aime24")
    with pytest.raises(UsageError, match="aime24 has no worked training problems"):
        with_examples(load_benchmark("aime24", "test", tmp_path), 1, tmp_path)
    with pytest.raises(UsageError, match="only 3"):
        with_examples(load_benchmark("gsm8k", "test", with_solutions(tmp_path)), 5, tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"math500\.jsonl"):
        load_benchmark("math500", "test", tmp_path)
