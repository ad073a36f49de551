"""One learner rank in a process of its own, as DeepSpeed wants it: runs the jobs of a JSON file one after another.

    python -m tests.learner_process JOBS.json RANK RANKS PORT

A job is one `LearnerRank`: {"name", "config", "model", "reference", "resume", "mutant", "actions"}. Each
action is [name, argument]; rank 0 writes what they answered to NAME.json beside the file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from configs.errors import RunError
from configs.schema import Config
from learner.alarms import Limits
from learner.ending import end_process
from learner.rank import LearnerRank, RankOptions
from tests.late_copies import LateCopies
from tests.learner_cases import Batch
from tests.learner_faults import planted


def main(jobs_file: Path, rank: int, ranks: int, port: int) -> None:
    for job in json.loads(jobs_file.read_text()):
        options = RankOptions(
            rank=rank,
            ranks=ranks,
            address="127.0.0.1",
            port=port,
            threads=1,
            model_path=Path(job["resume"] or job["model"]),
            reference_path=Path(job["reference"]),
            total_updates=10,
        )
        began = time.perf_counter()
        with planted(job["mutant"]):
            # The next job's rank finds the process group as this one leaves it: only the last one closes.
            learner_rank = LearnerRank(Config.model_validate_json(json.dumps(job["config"])), options)
            if job["resume"]:
                learner_rank.load_trainer_state(Path(job["resume"]) / "trainer")
            late = LateCopies(learner_rank)
            own = partial(act, learner_rank, Path(job["model"]))
            answers = [late.act(name, argument, own) for name, argument in job["actions"]]
            late.now()
            learner_rank.saved(wait=True)
        answers.append({"seconds": time.perf_counter() - began})
        if rank == 0:
            (jobs_file.parent / f"{job['name']}.json").write_text(json.dumps(answers))
    learner_rank.close()


def act(rank: LearnerRank, model: Path, name: str, argument: Any) -> Any:
    """Runs one action; a RunError is an answer too."""
    if name == "update":
        sequences = Batch(**argument["batch"]).sequences(model)
        try:
            with gradient_written(rank, argument["gradient"]):
                metrics = rank.update(sequences, argument["on_policy"], Limits(**argument["limits"]))
                return {name: value for name, value in metrics.items() if not name.startswith("time/")}
        except RunError as error:
            return {"error": str(error)}
    if name == "weights":
        weights = rank.whole_weights()
        if weights:
            save_file(weights, argument)
        return rank.version
    if name == "save":
        rank.begin_save(Path(argument))
        rank.saved(wait=True)
        return None
    if name == "reset":
        return rank.reset_reference(Path(argument))
    if name == "sleep":
        rank.sleep()
        copied = rank._copied.is_set()
        rank.sleep()  # a second time is nothing
        rank.wake()
        return copied
    raise ValueError(f"no action {name!r}")


@contextmanager
def gradient_written(rank: LearnerRank, path: str | None) -> Iterator[None]:
    """Within, every parameter's whole gradient is written to `path` as the optimizer finds it, not yet clipped.

    Only inside DeepSpeed's `step` is it reduced over the ranks at every ZeRO stage.
    """
    if path is None:
        yield
        return
    from deepspeed.utils import safe_get_full_grad

    right = rank._engine._take_model_step

    def write_and_step(*arguments: Any, **options: Any) -> None:
        gradients = {name: safe_get_full_grad(p).detach().clone() for name, p in rank._policy.named_weights().items()}
        if rank.options.rank == 0:
            save_file(gradients, path)
        right(*arguments, **options)

    with patch.object(rank._engine, "_take_model_step", write_and_step):
        yield


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
    end_process(0)
