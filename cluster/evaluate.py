"""An evaluation from its command line: benchmarks sampled by rollout workers on Ray, results written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actors.imports import importing
from cluster.interrupts import Interrupts, exit_code, stop_when_told
from cluster.terminal import escape_crashes, say_error
from configs.errors import FAILURE, USAGE, RunError, UsageError

if TYPE_CHECKING:
    from cluster.materials import Say
    from cluster.subjects import Subject
    from evaluation.command_line import Request


def main(argv: Sequence[str] | None = None, prog: str = "python -m cluster.evaluate") -> int:
    """Parse, evaluate, and return the exit code: 0, 1 failure, 2 usage, 130 / 143 interrupted."""
    from data.errors import DatasetError
    from evaluation.command_line import parse_request
    from learner.model_cache import ModelError

    try:
        return evaluate(parse_request(argv, prog))
    except (UsageError, DatasetError, ModelError) as error:
        say_error(error)
        return USAGE
    except RunError as error:
        say_error(f"{error} Finished problems stay: the same command goes on.")
        return FAILURE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one was", file=sys.stderr)
        return exit_code()


def evaluate(request: Request) -> int:
    """One evaluation, new or gone on with; returns 0, or 130 / 143 when told to stop."""
    # Imported here, so that --help and a typo in a task's name answer at once.
    with importing():
        from cluster.evaluation_report import BaseResults, earlier_results, is_results, save_pass_rates, write_report
        from cluster.progress import Display
        from cluster.subjects import find_subject
        from cluster.tasks import evaluation_config, load_benchmarks

    say = Display("off").say
    config = evaluation_config(request)
    benchmarks = load_benchmarks(request, config, say)
    subjects = [find_subject(request.model, request, config, benchmarks, request.output, say)]
    output, base = subjects[0].folder.path, None
    if request.base is not None and is_results(request.base):
        base = earlier_results(request.base, subjects[0].settings)
    elif request.base is not None:
        subjects.append(find_subject(request.base, request, config, benchmarks, output / "base", say))
        base = BaseResults(request.base, subjects[1].folder)
    code = sample(subjects, request, say)
    if code is not None:
        left = sum(subject.missing(task) for subject in subjects for task in subject.prompts)
        say(f"interrupted with {left:,} problems left; to go on, give the same command (its --output is {output})")
        return code
    for subject in subjects[1:]:
        write_report(subject, benchmarks, None, lambda _: None)
    write_report(subjects[0], benchmarks, base, say)
    if request.save_pass_rates is not None:
        save_pass_rates(subjects[0], request.save_pass_rates, say)
    return 0


def sample(subjects: Sequence[Subject], request: Request, say: Say) -> int | None:
    """Sample what is missing of every subject, one after the other; an exit code if told to stop before the end."""
    from cluster.ray_session import ray_session

    unfinished = [subject for subject in subjects if subject.unfinished()]
    if not unfinished:
        say("every problem is finished; nothing is sampled")
        return None
    with ray_session(unfinished[0].config.cluster.dashboard_port) as dashboard:
        say(dashboard)
        for subject in unfinished:
            tasks = subject.unfinished()
            for gold in dict.fromkeys(subject.golds[task] for task in tasks):
                code = _sample_tasks(subject, [task for task in tasks if subject.golds[task] == gold], request, say)
                if code is not None:
                    return code
    return None


def _sample_tasks(subject: Subject, tasks: Sequence[str], request: Request, say: Say) -> int | None:
    """Tasks whose gold answers are of one kind, by rollout workers of their own and verifiers for that kind."""
    from actors.engine import Sampling
    from actors.restarts import Restarts
    from actors.rollout_worker import SampleRequest
    from cluster.engine_fit import check_kv_cache
    from cluster.nodes import nodes_for_actors
    from cluster.placement import place
    from cluster.start import start_actors
    from cluster.tasks import judging
    from data.hashing import stable_hash
    from evaluation.benchmark_run import Samplers, sample_benchmark

    config = judging(subject.config, subject.golds[tasks[0]])
    rollout, workers = config.rollout, config.cluster.rollout_workers
    placement = place(config, nodes_for_actors())
    check_kv_cache(config, subject.path, placement.on_gpus)
    say(f"starting vLLM with {subject.path} in {workers} rollout workers")
    actors = start_actors(config, placement, subject.path, subject.path, 0, subject.path, Restarts(say), say)
    sampling = Sampling(request.temperature, rollout.max_completion_tokens, top_p=request.top_p)
    samplers = Samplers(
        rollouts=actors.rollouts,
        verifiers=actors.verifiers,
        request=SampleRequest(request.samples, sampling, stable_hash("evaluation", request.seed)),
        deadline_seconds=config.cluster.deadline_seconds,
        completions_under_way=2 * rollout.max_running * workers,
    )
    try:
        with Interrupts() as interrupts:
            for task in tasks:
                done = sample_benchmark(
                    samplers, subject.folder, task, subject.prompts[task], lambda: interrupts.exit_code is not None, say
                )
                if not done:
                    break
        return interrupts.exit_code
    finally:
        actors.stop()


if __name__ == "__main__":
    escape_crashes()
    stop_when_told()
    sys.exit(main())
