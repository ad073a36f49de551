"""Which weight transport is used where, and what can be said of those between GPUs without one."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import Any

import pytest
import torch

from cluster.weight_sender import WorkerUpdates
from cluster.weight_sender_cuda import NcclSender
from cluster.weight_sender_vllm import _described, _FunctionSender, _while
from cluster.weight_transport import CUDA_IPC, NCCL, SHARED_MEMORY, transport_of


def test_the_transport_follows_from_device_and_placement() -> None:
    assert transport_of("cpu", "colocated") == transport_of("cpu", "disaggregated") == SHARED_MEMORY
    assert transport_of("cuda", "colocated") == CUDA_IPC
    assert transport_of("cuda", "disaggregated") == NCCL


@pytest.mark.parametrize("name", [SHARED_MEMORY, CUDA_IPC, NCCL])
def test_every_transport_is_known_to_vllm_and_checks_what_came(name: str) -> None:
    """The receiving ends between GPUs are vLLM's with our protocol before them, and take our init's names."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from cluster.weight_receiver import WholeUpdates

    engine_class = WeightTransferEngineFactory._registry[name]()
    assert issubclass(engine_class, WholeUpdates)
    for method in ("start_weight_update", "update_weights", "parse_init_info"):
        assert getattr(engine_class, method) is getattr(WholeUpdates, method)
    engine = engine_class.__new__(engine_class)
    wanted = {field.name: 1 for field in fields(engine_class.init_info_cls) if field.name != "nccl_unique_id_b64"}
    engine.parse_init_info({**wanted, "names": ["a", "b"]})
    assert engine._expected == {"a", "b"}


def test_every_process_of_every_rollout_worker_has_a_rank_of_its_own_in_nccl() -> None:
    """vLLM adds the rank within an engine to the offset; the learner is rank 0."""
    calls: list[tuple[str, Any]] = []

    def call(method: str, arguments: Any) -> list[Any]:
        calls.append((method, arguments))
        return []

    sender = NcclSender(call, 1, 3, 2)
    updates = WorkerUpdates(call, ["w"])
    updates.of_worker = sender._ranks_of
    updates.init_weight_transfer_engine({"master_port": 1, "rank_offset": 1})
    ((_, told),) = calls
    ranks = [each["init_info"]["rank_offset"] + rank for each in told for rank in range(2)]
    assert ranks == [1, 2, 3, 4, 5, 6]
    assert all(each["init_info"]["names"] == ["w"] and each["init_info"]["master_port"] == 1 for each in told)


def test_an_update_is_stamped_with_the_version_and_tells_the_slowest_worker() -> None:
    """vLLM's senders finish without a version; the workers must get the one that was set."""
    calls: list[tuple[str, Any]] = []

    def call(method: str, arguments: Any) -> list[dict[str, float]]:
        calls.append((method, arguments))
        return [{"load": 1.0, "repack": 4.0}, {"load": 3.0, "repack": 2.0}]

    updates = WorkerUpdates(call, ["w"])
    updates.version = 7
    updates.start_weight_update()
    updates.update_weights({"names": ["w"]})
    updates.finish_weight_update()
    assert [method for method, _ in calls] == ["start_weight_update", "update_weights", "finish_weight_update"]
    assert calls[-1][1] == {"version": 7}
    assert updates.seconds == {"load": 3.0, "repack": 4.0}


def test_vllms_senders_walk_through_our_buckets_tensor_by_tensor() -> None:
    from tests.test_weight_sync import Given

    sender = NcclSender(lambda method, arguments: [], 64, 1, 1)
    sender._weights = Given({name: torch.full((20,), float(i)) for i, name in enumerate("abc")})
    sender._plan = [["a"], ["b", "c"]]
    source = sender._source()
    assert [(meta.name, meta.shape) for meta in source.metadata()] == [(name, (20,)) for name in "abc"]
    for _ in range(2):
        assert [(name, float(tensor[0])) for name, tensor in source] == [("a", 0.0), ("b", 1.0), ("c", 2.0)]


# -- senders of vLLM 0.26, which are functions ----------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_around_a_function_that_sends_rank_0_alone_makes_the_calls_of_an_update(rank: int) -> None:
    events: list[str] = []

    def call(method: str, arguments: Any) -> list[dict[str, float]]:
        events.append(method)
        return [{"load": 1.0}]

    _FunctionSender(rank, WorkerUpdates(call, ["w"]), lambda: events.append("send")).send_weights()
    assert events == (["send"] if rank else ["start_weight_update", "send", "finish_weight_update"])


def test_both_sides_of_a_broadcast_are_under_way_at_once() -> None:
    """Each waits for the other, as both do in NCCL; one after the other they would never meet."""
    both = threading.Barrier(2)
    assert _while(lambda: both.wait(5.0), lambda: both.wait(5.0) >= 0) is True


def test_a_call_that_fails_is_an_error_and_one_that_hangs_hides_none() -> None:
    def fail() -> None:
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        _while(fail, lambda: None)
    never = threading.Event()
    try:
        with pytest.raises(RuntimeError, match="refused"):
            _while(never.wait, fail)
    finally:
        never.set()


def test_what_workers_are_told_of_a_broadcast_is_what_this_vllm_takes() -> None:
    """0.26 takes the packing with every update, 0.32 once, when both sides meet."""
    from vllm.distributed.weight_transfer import nccl_engine

    from tests.test_weight_sync import Given

    sender = NcclSender(lambda method, arguments: [], 64, 1, 1)
    sender._weights = Given({name: torch.ones(2, 3, dtype=torch.bfloat16) for name in "ab"})
    told = _described(sender._source())
    assert told == {"names": ["a", "b"], "dtype_names": ["bfloat16"] * 2, "shapes": [[2, 3]] * 2}
    packing = {"packed", "packed_buffer_size_bytes", "packed_num_buffers"}
    takes = {field.name for field in fields(nccl_engine.NCCLWeightTransferUpdateInfo)}
    own_sender = hasattr(nccl_engine, "NCCLTrainerWeightTransferEngine")
    assert takes == set(told) | (set() if own_sender else packing)
