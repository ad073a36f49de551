"""Who sits where: bundles and seats for every shape of a run, and what cannot be seated is refused with the fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray
from hypothesis import assume, given
from hypothesis import strategies as st
from ray.util import placement_group, remove_placement_group

from cluster import reservation
from cluster.gpu import has_gpu
from cluster.placement import Placement, arrange
from cluster.reservation import Reservation
from configs.errors import RunError, UsageError
from configs.loading import load_config
from configs.schema import Config


def config(*overrides: str) -> Config:
    return load_config(None, list(overrides))


def shaped(workers: int, ranks: int, *more: str) -> Config:
    return config(f"cluster.rollout_workers={workers}", f"cluster.learner_ranks={ranks}", *more)


SIDE_BY_SIDE = "cluster.placement=disaggregated"


def seats_fit(placement: Placement) -> None:
    """No bundle is asked for more than it has."""
    for resource, of in (("CPU", "cpus"), ("GPU", "gpus")):
        for number, bundle in enumerate(placement.bundles):
            seats = [*placement.ranks, *placement.rollouts, *placement.verifiers]
            asked = sum(getattr(seat, of) for seat in seats if seat.bundle == number)
            assert asked <= bundle.get(resource, 0.0) + 1e-9


@given(
    workers=st.integers(1, 8),
    ranks=st.integers(0, 8),
    parallel=st.integers(1, 4),
    gpus=st.integers(0, 16),
    apart=st.booleans(),
    cores=st.integers(1, 64),
)
def test_whatever_is_seated_fits_and_each_side_has_its_gpus(
    workers: int, ranks: int, parallel: int, gpus: int, apart: bool, cores: int
) -> None:
    asked = shaped(workers, max(1, ranks), f"rollout.tensor_parallel={parallel}", *([SIDE_BY_SIDE] if apart else []))
    cluster = asked.cluster.model_copy(update={"learner_ranks": ranks})  # an evaluation has none
    try:
        placement = arrange(asked.model_copy(update={"cluster": cluster}), gpus, cores)
    except UsageError:
        assume(False)
        raise
    seats_fit(placement)
    assert (len(placement.rollouts), len(placement.ranks)) == (workers, ranks)
    assert placement.learner_threads >= 1
    assert sum(bundle.get("GPU", 0) for bundle in placement.bundles) <= gpus
    if gpus:
        assert all(seat.gpus > 0 for seat in (*placement.ranks, *placement.rollouts))
        own = {seat.bundle for seat in placement.ranks}
        assert len(own) == ranks, "every learner rank has a GPU of its own"
        shared = {seat.bundle for seat in placement.rollouts} & own
        assert bool(shared) == (bool(ranks) and not apart)


def test_auto_takes_turns_unless_staleness_lets_both_sides_work_at_once() -> None:
    colocated, apart = arrange(config(), 0, 2), arrange(config("cluster.max_staleness=2"), 0, 2)
    assert (colocated.kind, apart.kind) == ("colocated", "disaggregated")
    assert (colocated.learner_threads, apart.learner_threads) == (2, 1)
    assert "take turns on the CPU" in str(colocated) and "wait for each other" in str(colocated)
    assert "side by side" in str(apart) and "cluster.max_staleness=2" in str(apart)
    explicit = config(SIDE_BY_SIDE)
    assert explicit.cluster.resolved_max_staleness == 1 and config().cluster.resolved_max_staleness == 0


def test_one_gpu_is_shared_in_halves_and_several_workers_share_a_half() -> None:
    one = arrange(shaped(1, 1), 1, 8)
    assert [seat.gpus for seat in (*one.ranks, *one.rollouts)] == [0.5, 0.5]
    three = arrange(shaped(3, 2), 2, 8)
    assert [seat.bundle for seat in three.rollouts] == [0, 1, 0]
    assert {seat.gpus for seat in three.rollouts} == {0.25}
    assert "1 rollout worker and 1 learner rank take turns on 1 GPUs" in str(one)


@pytest.mark.parametrize(
    ("overrides", "gpus", "said"),
    [
        (("cluster.learner_ranks=3",), 2, "Lower it to 2"),
        ((SIDE_BY_SIDE, "cluster.learner_ranks=4"), 4, "none is left for sampling"),
        ((SIDE_BY_SIDE, "cluster.learner_ranks=2", "cluster.rollout_workers=3"), 4, "rollout_workers to 2"),
        ((SIDE_BY_SIDE, "rollout.tensor_parallel=4"), 4, "x rollout.tensor_parallel=4"),
        (("rollout.tensor_parallel=2",), 2, "Set rollout.tensor_parallel=1, or cluster.placement=disaggregated"),
        (("learner.zero_stage=3",), 1, "Set learner.zero_stage=2, learner.optimizer=adamw_cpu"),
    ],
)
def test_what_the_gpus_cannot_seat_is_refused_with_the_fix(overrides: tuple[str, ...], gpus: int, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        arrange(config(*overrides), gpus, 8)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("cluster.placement=colocated", "cluster.max_staleness=1"), "could never be used"),
        (("learner.objective=sft", "cluster.max_staleness=1"), "nothing can be stale"),
        (("learner.optimizer=adamw_cpu", "learner.zero_stage=0"), "choose learner.zero_stage=1, 2 or 3"),
    ],
)
def test_contradictions_are_refused_by_the_config(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        config(*overrides)


def test_what_others_hold_is_not_waited_for_long(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation, "RESERVE_SECONDS", 1.0)
    others = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(others.ready(), timeout=20)
    try:
        with pytest.raises(RunError, match=r"Ray did not reserve 3 bundles .* others use it"):
            Reservation(arrange(config(), 0, 2))
    finally:
        remove_placement_group(others)
    monkeypatch.setattr(reservation, "RESERVE_SECONDS", 20.0)
    Reservation(arrange(config(), 0, 2)).release()


def test_a_machine_has_a_gpu_if_its_driver_is_there(tmp_path: Path) -> None:
    (tmp_path / "driver").touch()
    assert has_gpu(tmp_path / "driver") and not has_gpu(tmp_path / "none")
