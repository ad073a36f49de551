"""A*-PO's optimal values: how well the reference policy could do on a problem, from samples of it."""

from __future__ import annotations

import numpy as np


def optimal_value(rewards: np.ndarray, beta: float) -> float:
    """V*(x) = beta log mean exp(r / beta) over rewards float [samples] of the reference policy's completions
    of one problem (Brantley et al. 2025); between the mean (large beta) and the maximum (small beta)."""
    scaled = np.asarray(rewards, dtype=np.float64) / beta
    largest = scaled.max()
    return float(beta * (largest + np.log(np.mean(np.exp(scaled - largest)))))
