"""Pure reward functions and their registry. Importing this package registers them all."""

from rewards import accuracy, format
from rewards.registry import REWARDS, Case, Judgement, Outcome, Score, Tags, check_weights, reward, weigh

__all__ = [
    "REWARDS",
    "Case",
    "Judgement",
    "Outcome",
    "Score",
    "Tags",
    "accuracy",
    "check_weights",
    "format",
    "reward",
    "weigh",
]
