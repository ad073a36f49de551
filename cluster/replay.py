"""Recompute one update of a run from disk: `pocketgrpo replay runs/NAME --step N`."""

from __future__ import annotations

import os
from collections.abc import Sequence as ListOf
from pathlib import Path

from cluster.checkpoints import Checkpoints, load_state, state_of, step_of
from cluster.loop import learn, trained_groups
from cluster.materials import prepare
from cluster.optimal_values import optimal_values
from cluster.placement import free_port, learner_threads
from cluster.reference import References
from cluster.run_folder import RunFolder
from cluster.terminal import Parser, say_error
from configs.errors import RunError, UsageError
from configs.loading import load_config
from configs.schema import Config
from data.rollouts import read_groups
from learner.alarms import Limits
from learner.batching import Sequence
from learner.rank import LearnerRank, RankOptions, with_old_logprobs

COMPARED = ("policy/loss", "policy/grad_norm", "policy/entropy", "rollout/logprob_diff")


def main(argv: ListOf[str] | None = None) -> int:
    """Print recorded and recomputed figures side by side; 0 if the loss is the same, 1 if not, 2 on misuse."""
    parser = Parser(prog="pocketgrpo replay", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, such as runs/NAME")
    parser.add_argument("--step", type=int, required=True, help="the step whose update is recomputed")
    try:
        given = parser.parse_args(argv)
        recorded, recomputed = replay(given.run, given.step)
    except UsageError as error:
        say_error(error)
        return 2
    except RunError as error:
        say_error(error)
        return 1
    print(f"{'step ' + str(given.step):24}{'recorded':>24}{'recomputed':>24}")
    for name in COMPARED:
        print(f"{name:24}{recorded[name]:>24.17g}{recomputed[name]:>24.17g}")
    same = recorded["policy/loss"] == recomputed["policy/loss"]
    print("the loss is the same, bit for bit" if same else "the loss differs")
    return 0 if same else 1


def replay(folder: Path, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics recorded at `step`, metrics of the same update recomputed from disk).

    UsageError if the run lacks the rollouts of that step or the weights before it.
    """
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} is not a run's folder: it has no config.yaml. Give runs/NAME.")
    run = RunFolder(folder)
    config = load_config(folder / "config.yaml")
    if config.learner.supervised:
        raise UsageError(
            f"{folder} learnt by learner.objective=sft from demonstrations: it has no rollouts to replay. Give the "
            "folder of an RL run."
        )
    lines = [line for line in run.read_metrics() if line["step"] == step and "policy/loss" in line]
    if not lines or not run.rollouts(step).is_file():
        raise UsageError(f"{folder} has no metrics or no rollouts of step {step}; it may not have got there.")
    groups = read_groups(run.rollouts(step))
    learner = LocalLearner(config, run, step)
    try:
        return lines[0], learn(learner, config, trained_groups(config, groups, step), learner.values)
    finally:
        learner.rank.close()


class LocalLearner:
    """One learner rank in this process, as it stood before a step."""

    def __init__(self, config: Config, run: RunFolder, step: int) -> None:
        materials = prepare(config, lambda _: None)
        initial = materials.model_path
        before = run.checkpoints / f"step_{step - 1:06d}"
        if step > 1:
            self._check(config, run, before)
        references = References(run.references, initial, state_of(before).reference if step > 1 else None)
        options = RankOptions(
            rank=0,
            ranks=1,
            address="127.0.0.1",
            port=free_port(),
            threads=learner_threads(config, os.cpu_count() or 1),
            model_path=before if step > 1 else initial,
            reference_path=references.path,
            total_updates=config.training.steps * config.updates_per_batch,
        )
        self.values = None
        if config.learner.objective == "a_star_po":
            self.values = optimal_values(config, materials.train, run.optimal_values, None, None, lambda _: None)
        self.rank = LearnerRank(config, options)
        if step > 1 and config.cluster.learner_ranks == 1:
            self.rank.load_trainer_state(before / "trainer")

    def update(self, sequences: list[Sequence], on_policy: bool, limits: Limits) -> dict[str, float]:
        return self.rank.update(sequences, on_policy, limits)

    def with_old_logprobs(self, sequences: list[Sequence]) -> list[Sequence]:
        return with_old_logprobs(sequences, self.rank.logprobs(sequences))

    @staticmethod
    def _check(config: Config, run: RunFolder, before: Path) -> None:
        steps = [step_of(path) + 1 for path in Checkpoints(run.checkpoints, keep=1).all()]
        if step_of(before) + 1 not in steps:
            raise UsageError(
                f"The weights before step {step_of(before) + 1} are not on disk. Of this run, step 1 and the steps "
                f"after a checkpoint can be replayed: {', '.join(map(str, [1, *steps]))}."
            )
        load_state(before)
        if config.cluster.learner_ranks > 1 and config.updates_per_batch > 1:
            raise UsageError(
                "A step of several updates by several learner ranks cannot be replayed by the one rank here; "
                "replay a run with cluster.learner_ranks=1 or with one update per sampling batch."
            )
