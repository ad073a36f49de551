"""Accuracy on held-out problems during training, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine import Sampling
from actors.rollout_pool import RolloutPool
from actors.rollout_worker import SampleRequest
from actors.sampling import sample_and_verify
from actors.verifier_pool import VerifierPool
from configs.schema import Config
from data.hashing import stable_hash
from data.records import Group, Prompt
from evaluation.estimators import Estimate
from evaluation.problem_results import result_of
from evaluation.scores import figures_of, score


@dataclass(frozen=True)
class Accuracy:
    """Share of samples answered correctly (`lenient`), and where the prompt asks for the answer (`strict`).

    rewards and length are means, truncated is a share; `problems` problems had `samples` samples each.
    """

    lenient: Estimate
    strict: Estimate
    problems: int
    samples: int
    rewards: dict[str, float]
    length: float
    truncated: float

    def __str__(self) -> str:
        times = f", {self.samples} samples each" if self.samples > 1 else ""
        strict = "" if self.strict == self.lenient else f" (strict {self.strict})"
        return f"{self.lenient}{strict} of {self.problems} problems{times}"

    def metrics(self) -> dict[str, float]:
        rewards = {f"eval/reward/{name}": value for name, value in self.rewards.items()}
        return {
            "eval/accuracy": self.lenient.value,
            "eval/accuracy_low": self.lenient.low,
            "eval/accuracy_high": self.lenient.high,
            "eval/accuracy_strict": self.strict.value,
            "eval/accuracy_strict_low": self.strict.low,
            "eval/accuracy_strict_high": self.strict.high,
            "eval/length": self.length,
            "eval/truncated": self.truncated,
            **rewards,
        }


def measure_accuracy(rollouts: RolloutPool, verifiers: VerifierPool, prompts: list[Prompt], config: Config) -> Accuracy:
    """`evaluation.samples` completions a held-out prompt, sampled as `evaluation` says, verified like those of
    training. RunError if they are not all there in time."""
    evaluation = config.evaluation
    sampling = Sampling(evaluation.temperature, config.rollout.max_completion_tokens, top_p=evaluation.top_p)
    request = SampleRequest(evaluation.samples, sampling, stable_hash("evaluation", config.training.seed))
    sampled = sample_and_verify(rollouts, verifiers, prompts, request, config.cluster.deadline_seconds)
    return accuracy_of(sampled.groups)


def accuracy_of(groups: list[Group]) -> Accuracy:
    """The accuracy of verified groups of the same size."""
    scored = score([figures_of(result_of(group)) for group in groups])
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    return Accuracy(
        lenient=scored.lenient,
        strict=scored.strict,
        problems=scored.problems,
        samples=scored.samples,
        rewards={name: sum(v.rewards[name] for v in verdicts) / len(verdicts) for name in verdicts[0].rewards},
        length=scored.length,
        truncated=scored.truncated,
    )
