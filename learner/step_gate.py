"""Whether the optimizer makes its step, decided when the gradient's norm is known."""

from __future__ import annotations

import math
from typing import Any


class StepGate:
    """Stands before the `step` of the optimizer inside a DeepSpeed engine.

    At every ZeRO stage the engine reduces the gradients, takes their norm over all ranks, clips, and only then
    calls the optimizer (under ZeRO once a parameter group); after it the engine clears its gradients. A call that
    the gate does not pass on leaves masters and moments as they are, and the weights, copies of the masters, too.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._ceiling = -math.inf
        self._optimizer_step = engine.basic_optimizer.step
        engine.basic_optimizer.step = self._pass_on

    def step(self, ceiling: float) -> float:
        """The gradient's norm before clipping, infinite if it is no number; the optimizer steps only if it is a
        number up to `ceiling`. Weights or not, the gradients are gone."""
        self._ceiling = ceiling
        self._engine.step()
        return _number(self._engine.get_global_grad_norm())

    def _pass_on(self, *arguments: Any, **options: Any) -> Any:
        # The wrappers around an optimizer hand their norm to the engine after the step; ZeRO 0 in fp32 has no wrapper.
        norm = getattr(self._engine.optimizer, "_global_grad_norm", None)
        norm = _number(self._engine.get_global_grad_norm() if norm is None else norm)
        return self._optimizer_step(*arguments, **options) if norm <= self._ceiling and norm < math.inf else None


def _number(norm: Any) -> float:
    """DeepSpeed says -1 of some gradients that are no numbers."""
    norm = float(norm)
    return norm if 0.0 <= norm < math.inf else math.inf
