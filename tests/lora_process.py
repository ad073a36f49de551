"""Learner ranks with LoRA in processes of their own: runs the jobs of a JSON file one after another.

    python -m tests.lora_process JOBS.json RANK RANKS PORT

A job is one `LearnerRank`: {"name", "config", "base", "resume", "fault", "actions"}; an action is [name, argument,
fault]. A fault is planted while the rank is built, or while the action lasts. What rank 0 answered goes to NAME.json
beside the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.replay import COMPARED, replay
from configs.errors import RunError
from configs.schema import Config
from learner.batching import Sequence, micro_batches
from learner.deepspeed_engine import gathered
from learner.ending import end_process
from learner.lora import Adapters
from learner.policy import load_policy
from learner.rank import LearnerRank, RankOptions
from tests.late_copies import LateCopies
from tests.learner_cases import REPOSITORY, Batch

DEADLINE_SECONDS = 240.0


# -- planted faults -------------------------------------------------------------------------------


def _without_one(self: Adapters, name: str, weight: Tensor, parts: list[Tensor]) -> Tensor:
    return weight if name == "model.layers.1.mlp.down_proj.weight" else _right_merged(self, name, weight, parts)


def _without_scale(self: Adapters, name: str, weight: Tensor, parts: list[Tensor]) -> Tensor:
    a, b = parts or (torch.zeros(1), torch.zeros(1))
    return weight + b.detach() @ a.detach()


def _in_place(self: Adapters, name: str, weight: Tensor, parts: list[Tensor]) -> Tensor:
    return weight.copy_(_right_merged(self, name, weight, parts))


_right_merged = Adapters.merged
FAULTS: dict[str, Any] = {
    "one adapter is not merged": patch.object(Adapters, "merged", _without_one),
    "adapters are merged unscaled": patch.object(Adapters, "merged", _without_scale),
    "adapters are merged in place": patch.object(Adapters, "merged", _in_place),
    "adapters are not disabled": patch.object(Adapters, "disabled", lambda self: contextlib.nullcontext()),
    "adapters are not loaded": patch.object(Adapters, "load", lambda self, folder: None),
}


def planted(name: str | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if name is None else FAULTS[name]


# -- one process ----------------------------------------------------------------------------------


def main(jobs_file: Path, rank: int, ranks: int, port: int) -> None:
    slice_small_parameters_too()
    for job in json.loads(jobs_file.read_text()):
        base = Path(job["base"])
        model = Path(job["resume"] or base)
        options = RankOptions(rank, ranks, "127.0.0.1", port, 1, model, base, total_updates=10)
        with planted(job["fault"]):
            # The next job's rank finds the process group as this one leaves it: only the last one closes.
            learner_rank = LearnerRank(Config.model_validate_json(json.dumps(job["config"])), options)
            if job["resume"]:
                learner_rank.load_trainer_state(model / "trainer")
        late, answers = LateCopies(learner_rank), []
        for name, argument, fault in job["actions"]:
            with planted(fault):
                answers.append(late.act(name, argument, partial(act, learner_rank, base)))
        late.now()
        learner_rank.saved(wait=True)
        if rank == 0:
            (jobs_file.parent / f"{job['name']}.json").write_text(json.dumps(answers))
    learner_rank.close()


def slice_small_parameters_too() -> None:
    """Have ZeRO-3 slice every parameter, however small: it would keep those of the tiny models whole."""
    import deepspeed

    right = deepspeed.initialize

    def initialize(config: dict[str, Any], **others: Any) -> Any:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return right(config=config, **others)

    deepspeed.initialize = initialize


def act(rank: LearnerRank, base: Path, name: str, argument: Any) -> Any:
    """Runs one action; a RunError is an answer too."""
    if name == "update":
        try:
            metrics = rank.update(Batch(**argument).sequences(base), on_policy=False)
            return {name: value for name, value in metrics.items() if not name.startswith("time/")}
        except RunError as error:
            return {"error": str(error)}
    if name == "on-policy update":
        try:
            return rank.update(read_sequences(Path(argument)), on_policy=True)
        except RunError as error:
            return {"error": str(error)}
    if name == "save":
        rank.begin_save(Path(argument))
        rank.saved(wait=True)
        return None
    if name == "replay":
        recorded, recomputed = replay(Path(argument), step=3)
        return [{compared: line[compared] for compared in COMPARED} for line in (recorded, recomputed)]
    if name == "reference":
        return reference_difference(rank, base)
    tensors = whole(rank, name)
    if rank.options.rank == 0:
        save_file(tensors, f"{argument}.draft")
        Path(f"{argument}.draft").rename(argument)
    return None


def whole(rank: LearnerRank, name: str) -> dict[str, Tensor]:
    """Tensors on rank 0: the merged `weights`, the frozen `base`, or the `logprobs` of a batch's completions."""
    if name == "weights":
        return rank.whole_weights()
    if name == "base":
        weights = rank._policy.named_weights()
        with gathered(list(weights.values()), rank.config.learner.zero_stage):
            return {name: weight.detach().clone() for name, weight in weights.items()}
    if name == "logprobs":
        answers = rank.logprobs(Batch().sequences(rank.options.reference_path))
        return {str(index): torch.from_numpy(values) for index, values in answers}
    raise ValueError(f"no action {name!r}")


def reference_difference(rank: LearnerRank, base: Path) -> dict[str, float]:
    """How far the rank's reference is from the base model, and its policy: largest |difference| of log-probs."""
    sequences = Batch().sequences(base)
    (batch,) = micro_batches(sequences, [1.0] * 9, list(range(9)), budget=4096, packing=False, rank=0, ranks=1)
    alone = load_policy(base, rank.config.model.dtype, rank.config.learner.logprob_chunk_tokens, False)
    with torch.no_grad():
        expected, _ = rank._forward(alone, batch)
        policy, _ = rank._forward(rank._engine, batch)
    reference = rank._reference_logprobs(batch)
    assert reference is not None
    return {"reference": float((reference - expected).abs().max()), "policy": float((policy - expected).abs().max())}


# -- sequences on disk ----------------------------------------------------------------------------


def write_sequences(path: Path, sequences: list[Sequence]) -> None:
    rows = [(s.prompt_ids, s.completion_ids, s.sampler_logprobs, s.advantage) for s in sequences]
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps([[r.tolist() if isinstance(r, np.ndarray) else r for r in row] for row in rows]))
    draft.rename(path)


def read_sequences(path: Path) -> list[Sequence]:
    """What `write_sequences` has written, or will: it is waited for."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody has written {path}"
        time.sleep(0.05)
    rows = json.loads(path.read_text())
    return [Sequence(np.array(p), np.array(c), np.array(q, dtype=np.float32), a) for p, c, q, a in rows]


# -- starting processes ---------------------------------------------------------------------------


def run(folder: Path, jobs: list[dict[str, Any]], ranks: int) -> dict[str, list[Any]]:
    """Runs the jobs, one after another, in `ranks` fresh processes; what each action answered, by job."""
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with contextlib.ExitStack() as started:
        processes = [started.enter_context(_started(folder, rank, ranks, port)) for rank in range(ranks)]
        codes = [process.wait(DEADLINE_SECONDS) for process in processes]
    assert codes == [0] * ranks, "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(ranks))
    return {job["name"]: json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs}


@contextlib.contextmanager
def _started(folder: Path, rank: int, ranks: int, port: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.lora_process", str(folder / "jobs.json"), str(rank), str(ranks), port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with (folder / f"{rank}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
    end_process(0)
