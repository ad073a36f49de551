"""Accuracy on held-out problems, with a confidence interval."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

from actors.engine import Sampling
from actors.rollout_pool import RolloutPool
from actors.rollout_worker import SampleRequest
from actors.sampling import sample_and_verify
from actors.verifier_pool import VerifierPool
from configs.schema import Config
from data.hashing import stable_hash
from data.records import Prompt


@dataclass(frozen=True)
class Accuracy:
    """Share of `problems` answered correctly, and its Wilson interval; `format` and `length` are means."""

    value: float
    low: float
    high: float
    problems: int
    rewards: dict[str, float]
    length: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.problems} problems"

    def metrics(self) -> dict[str, float]:
        rewards = {f"eval/reward/{name}": value for name, value in self.rewards.items()}
        return {
            "eval/accuracy": self.value,
            "eval/accuracy_low": self.low,
            "eval/accuracy_high": self.high,
            "eval/length": self.length,
            **rewards,
        }


def wilson_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def measure_accuracy(rollouts: RolloutPool, verifiers: VerifierPool, prompts: list[Prompt], config: Config) -> Accuracy:
    """One completion a held-out prompt at `evaluation.temperature`, verified like those of training."""
    sampling = Sampling(config.evaluation.temperature, config.rollout.max_completion_tokens)
    request = SampleRequest(1, sampling, stable_hash("evaluation", config.training.seed))
    sampled = sample_and_verify(rollouts, verifiers, prompts, request, config.rollout.deadline_seconds)
    verdicts = [group.verdicts[0] for group in sampled.groups]
    correct = sum(verdict.outcome == "correct" for verdict in verdicts)
    low, high = wilson_interval(correct, len(verdicts), config.evaluation.confidence)
    names = config.rewards.weights
    return Accuracy(
        value=correct / len(verdicts),
        low=low,
        high=high,
        problems=len(verdicts),
        rewards={name: sum(v.rewards[name] for v in verdicts) / len(verdicts) for name in names},
        length=sum(len(group.completions[0].token_ids) for group in sampled.groups) / len(verdicts),
    )
