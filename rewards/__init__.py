"""Pure reward functions and their registry. Importing this package registers them all."""

from rewards import accuracy, format, overlong
from rewards.registry import REWARDS, Case, Judgement, Length, Outcome, Score, Tags, check_weights, reward, weigh

__all__ = [
    "REWARDS",
    "Case",
    "Judgement",
    "Length",
    "Outcome",
    "Score",
    "Tags",
    "accuracy",
    "check_weights",
    "format",
    "overlong",
    "reward",
    "weigh",
]
