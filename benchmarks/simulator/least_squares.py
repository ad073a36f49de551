"""Rates out of timings: least squares in which no rate is negative and every timing counts alike, large or small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def least_squares(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """The rates x >= 0 with rows @ x nearest to `seconds` by relative error.

    ValueError if there are fewer timings than rates.
    """
    if len(rows) < len(rows[0]):
        raise ValueError(f"{len(rows)} timings cannot tell {len(rows[0])} rates apart; measure more of them")
    target = np.asarray(seconds, dtype=np.float64)
    matrix = np.asarray(rows, dtype=np.float64) / target[:, None]
    rates = np.zeros(matrix.shape[1])
    kept = np.arange(matrix.shape[1])
    while len(kept):
        scale = np.linalg.norm(matrix[:, kept], axis=0)  # their units differ by orders of magnitude
        scale[scale == 0] = 1.0
        found = np.linalg.lstsq(matrix[:, kept] / scale, np.ones(len(target)), rcond=None)[0] / scale
        if (found >= 0).all():
            rates[kept] = found
            break
        kept = kept[found * scale > (found * scale).min()]
    return [float(rate) for rate in rates]
