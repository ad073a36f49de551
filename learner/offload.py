"""The optimizer's tensors out of the GPU's memory while a rollout worker samples on it, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from learner.partitions import master_tensors


class OptimizerOffload:
    """Moves fp32 masters and optimizer states that live on `home` to the CPU's memory and back.

    The weights themselves stay. Masters that are the model's own parameters (ZeRO 0 in float32), and what
    ZeRO-Offload keeps in the CPU's memory anyway, are left where they are.
    """

    def __init__(self, engine: Any, home: torch.device) -> None:
        self._engine, self._home = engine, home
        self._moved: list[Callable[[torch.device], None]] = []

    def sleep(self) -> None:
        """Nothing if it sleeps already."""
        if self._moved:
            return
        self._moved = [*self._masters(), *self._states()]
        self._move(torch.device("cpu"))
        if self._home.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        self._move(self._home)
        self._moved = []

    def _move(self, device: torch.device) -> None:
        with torch.no_grad():
            for move in self._moved:
                move(device)

    def _masters(self) -> list[Callable[[torch.device], None]]:
        own = {id(parameter) for parameter in self._engine.module.parameters()}
        masters = [m for m in master_tensors(self._engine) if id(m) not in own and m.device.type == self._home.type]
        return [lambda device, master=master: _replace(master, device) for master in masters]  # type: ignore[misc]

    def _states(self) -> list[Callable[[torch.device], None]]:
        """Not numbers such as AdamW's step count, which torch keeps in the CPU's memory."""
        held = [
            (state, key)
            for state in self._engine.basic_optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.ndim and value.device.type == self._home.type
        ]
        return [
            lambda device, state=state, key=key: state.update({key: state[key].to(device, copy=True)})  # type: ignore[misc]
            for state, key in held
        ]


def _replace(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device, copy=True)
