"""DeepSpeed: the process group, the engine around the policy, and gathering what ZeRO-3 has sliced.

The only file that knows DeepSpeed, which it imports lazily.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config, Learner
from learner.lora import FOLDER, add_adapters
from learner.optimizers import build_optimizer
from learner.policy import Policy, load_policy
from learner.rendezvous import LOOPBACK, init_method


def join_process_group(rank: int, ranks: int, address: str, port: int, deadline_seconds: float) -> None:
    """NCCL where there is a GPU; else gloo, without compiling DeepSpeed's own CPU collectives."""
    on_gpu = torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"
    if address == LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.environ["LOCAL_RANK"] = "0" if on_gpu else str(rank)  # Ray lets every rank see its own GPU alone
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=deadline_seconds),
        init_method=init_method(address, port),
        rank=rank,
        world_size=ranks,
        verbose=False,
    )


def build_engine(config: Config, model_path: Path, base_path: Path) -> Any:
    """The DeepSpeed engine around the policy. Default path: nothing is compiled.

    base_path: with LoRA, the model under the adapters; model_path is then the same or a checkpoint.
    """
    import deepspeed

    learner = config.learner
    policy = _load_policy(config, model_path, base_path)
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=build_optimizer(policy, learner),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": learner.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": learner.zero_stage, "overlap_comm": False, **_offload(learner)},
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": config.model.dtype == "bfloat16"},
            "steps_per_print": 10**9,
        },
    )
    engine.basic_optimizer.state.clear()  # of the step on zero gradients, which counts in the bias correction
    if learner.zero_stage == 0:
        _keep_grad_norm(engine)
    return engine


def _offload(learner: Learner) -> dict[str, Any]:
    """ZeRO-Offload, with torch's AdamW in the CPU's memory: DeepSpeed's own would have to be compiled."""
    return {"offload_optimizer": {"device": "cpu"}} if learner.optimizer == "adamw_cpu" else {}


def _load_policy(config: Config, model_path: Path, base_path: Path) -> Policy:
    lora = config.model.lora_rank > 0
    policy = load_policy(
        base_path if lora else model_path,
        config.model.dtype,
        config.learner.logprob_chunk_tokens,
        config.model.gradient_checkpointing,
        entropy_gradient=config.learner.entropy_coefficient > 0,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if lora:
        model = config.model
        policy.adapters = add_adapters(policy.model, model.lora_rank, model.lora_alpha, config.training.seed, base_path)
        if model_path != base_path:
            policy.adapters.load(model_path / FOLDER)
    return policy


def _keep_grad_norm(engine: Any) -> None:
    """Have ZeRO 0 in fp32, whose engine clips gradients itself, keep their norm as every other engine does."""

    def clip_fp32_gradients() -> None:
        engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(
            engine.module.parameters(), engine.gradient_clipping()
        )

    engine.clip_fp32_gradients = clip_fp32_gradients


@contextmanager
def gathered(parameters: list[torch.nn.Parameter], zero_stage: int) -> Iterator[None]:
    """Within, the parameters are whole on every rank; a collective under ZeRO-3, nothing otherwise."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, enabled=zero_stage == 3):
        yield


def own_slice(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The live elements that ZeRO-3 keeps on this rank, flat; the last ranks' are filled up to as many."""
    kept: torch.Tensor = parameter.ds_tensor.detach()  # type: ignore[attr-defined]
    return kept


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The whole shape, also where ZeRO-3 has left only a slice in place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
