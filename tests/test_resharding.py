"""Trainer state saved by so many ranks at one ZeRO stage and loaded by others at another: by name it is the same
numbers, and the next step is that of the run left alone. Learner ranks in processes, as in test_learner.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.learner_cases import Batch, Case, Job, run_all, tiny_models, update
from tests.plain_step import minus, norm
from tests.tiny import open_plain

BATCH, OTHER_BATCH = Batch(old=0.4), Batch(seed=4, count=6, old=0.4)
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adamw_8bit": ("state1", "state2")}
QUANTISED = 0.02  # |difference| / |moment|, of a moment that was quantised once more
STEP_LIMITS = {"float32": 1e-4, "bfloat16": 0.1}  # |difference| / |step| of the next step
STEP_LIMIT_8_BIT = 0.05


@dataclass(frozen=True)
class Change:
    """What saved, and what loads it."""

    source: Case
    target: Case

    @property
    def name(self) -> str:
        return f"{self.source.name}-to-zero{self.target.zero}-{self.target.ranks}ranks-{self.target.mutant or ''}"


def change(zero: int, ranks: int, to_zero: int, to_ranks: int, **options: Any) -> Change:
    """Between two layouts, all else alike. A fault is planted in what saves."""
    source = Case(zero, ranks=ranks, use="saves", **options)
    return Change(source, replace(source, zero=to_zero, ranks=to_ranks, mutant=None))


def ranks_of(zero: int, to_zero: int) -> tuple[int, int]:
    """So that every change of stage occurs, with one and with two ranks, on either side."""
    if zero == to_zero:
        return (1, 2) if zero % 2 else (2, 1)
    return [(1, 2), (2, 1), (1, 1), (2, 2)][(zero + to_zero) % 4]


FAST = (("learning_rate", 5e-3),)  # which moves a bfloat16
CHANGES = [
    *(change(a, ranks_of(a, b)[0], b, ranks_of(a, b)[1]) for a in range(4) for b in range(4)),
    change(3, 2, 1, 1, tied=True),
    *(change(*layouts, optimizer="adamw_8bit") for layouts in [(2, 1, 3, 2), (3, 2, 0, 1), (0, 1, 1, 2), (0, 1, 0, 2)]),
    *(change(*layouts, dtype="bfloat16", learner=FAST) for layouts in [(1, 2, 0, 1), (0, 1, 1, 2), (3, 1, 1, 1)]),
]
ADAPTED = [change(2, 1, 3, 2, lora=4), change(3, 2, 0, 1, lora=4)]
SHIFTED = change(2, 2, 3, 1, mutant="offsets shifted by one")
FORGOTTEN = Change(Case(2, use="saves"), Case(3, ranks=2, use="saves", mutant="moments not put together"))
FRESH = change(2, 1, 3, 2, learner=(("warmup", 1.0),))  # saved before the first step
ALL = [*CHANGES, *ADAPTED, SHIFTED, FORGOTTEN, FRESH]


@dataclass(frozen=True)
class Outcomes:
    """Where checkpoints and weights lie."""

    folder: Path

    def left_alone(self, each: Change) -> dict[str, Tensor]:
        """The weights a step after the save."""
        return load_file(self.folder / f"{each.source.name}.safetensors")

    def resumed(self, each: Change) -> dict[str, Tensor]:
        """The same in the run that was resumed."""
        return load_file(self.folder / f"{each.name}.safetensors")

    def saved(self, each: Change) -> Path:
        return self.folder / f"{each.source.name}-checkpoint"

    def loaded(self, each: Change) -> Path:
        """A checkpoint saved again as soon as it was loaded."""
        return self.folder / f"{each.name}-checkpoint"

    def next_step(self, each: Change) -> float:
        """|difference of the next steps| / |step|."""
        before = load_file(self.saved(each) / "model.safetensors")
        alone, resumed = self.left_alone(each), self.resumed(each)
        return norm(minus(alone, resumed)) / norm(minus(alone, before))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """All that save, and then all that load, each in as few processes as can be."""
    folder = tmp_path_factory.mktemp("resharding")
    found, models = Outcomes(folder), tiny_models(folder / "models")
    savers, loaders = [], []
    for each in {each.source.name: each for each in ALL}.values():
        steps = [] if each is FRESH else [update(BATCH), update(OTHER_BATCH)]
        kept = ["weights", str(folder / f"{each.source.name}.safetensors")]
        savers.append(Job(each.source, [*steps, ["late save", str(found.saved(each))], update(BATCH), kept]))
    for each in ALL:
        suffix = each.name.removeprefix(each.target.name)
        actions = [["late save", str(found.loaded(each))], update(BATCH)]
        kept = ["weights", str(folder / f"{each.name}.safetensors")]
        loaders.append(Job(each.target, [*actions, kept], resume=found.saved(each), suffix=f"-{suffix}"))
    run_all(folder / "savers", models, savers)
    run_all(folder / "loaders", models, loaders)
    return found


# -- what a checkpoint holds, by arithmetic on its files alone ------------------------------------


def whole(folder: Path, case: Case, moment: str | None) -> dict[str, Tensor]:
    """float32 of the masters, or a moment, of every parameter, flat: joined as ZeRO is documented to cut them."""
    files = [load_file(folder / "trainer" / f"rank_{rank}.safetensors") for rank in range(case.ranks)]
    found: dict[str, Tensor] = {}
    for index, group in enumerate(groups(folder)):
        if case.zero == 0:
            first = len(found)
            found |= {name: part(files[0], first + i, moment).flatten() for i, name in enumerate(group)}
            continue
        parts = [part(file, index, moment) for file in files]
        if case.zero < 3:
            pieces = torch.cat(parts)[: sum(group.values())].split(list(group.values()))
        else:
            sizes = [ceil(size / case.ranks) for size in group.values()]
            cut = zip(*(flat.split(sizes) for flat in parts), strict=True)
            pieces = tuple(torch.cat(each)[:n] for each, n in zip(cut, group.values(), strict=True))
        found |= dict(zip(group, pieces, strict=True))
    return found


def groups(folder: Path) -> Iterator[dict[str, int]]:
    """The sizes of matrices and of vectors, in the order of the model."""
    parameters = dict(open_plain(folder).named_parameters())
    for matrices in (True, False):
        yield {name: p.numel() for name, p in parameters.items() if (p.ndim >= 2) == matrices}


def part(file: dict[str, Tensor], index: int, moment: str | None) -> Tensor:
    """One tensor, dequantised by hand."""
    if moment is None:
        return file[f"master.{index}"]
    values = file[f"state.{index}.{moment}"]
    if values.dtype != torch.uint8:
        return values
    scales, meaning = (file[f"state.{index}.{key}{moment[-1]}"] for key in ("absmax", "qmap"))
    return meaning[values.flatten().long()] * scales.repeat_interleave(256)[: values.numel()]


# -- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", CHANGES, ids=lambda each: each.name)
def test_masters_and_moments_are_the_same_numbers_by_name(each: Change, outcomes: Outcomes) -> None:
    before, after = outcomes.saved(each), outcomes.loaded(each)
    saved, loaded = whole(before, each.source, None), whole(after, each.target, None)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    model = load_file(before / "model.safetensors")
    assert all(torch.equal(t.reshape(-1), loaded[name].to(t.dtype)) for name, t in model.items())
    for moment in MOMENTS[each.source.optimizer]:
        saved, loaded = whole(before, each.source, moment), whole(after, each.target, moment)
        assert norm(saved) > 0
        if each.source.optimizer == "adamw":
            assert all(torch.equal(saved[name], loaded[name]) for name in saved), moment
        else:
            assert norm(minus(saved, loaded)) < QUANTISED * norm(saved), moment


@pytest.mark.parametrize("each", [*CHANGES, *ADAPTED, FRESH], ids=lambda each: each.name)
def test_the_next_step_is_that_of_the_run_left_alone(each: Change, outcomes: Outcomes) -> None:
    limit = STEP_LIMIT_8_BIT if each.source.optimizer == "adamw_8bit" else STEP_LIMITS[each.source.dtype]
    assert outcomes.next_step(each) < limit


def test_every_change_of_stage_and_of_ranks_is_made() -> None:
    fp32 = [(e.source, e.target) for e in CHANGES if e.source.dtype == "float32" and e.source.optimizer == "adamw"]
    assert {(a.zero, b.zero) for a, b in fp32} == {(a, b) for a in range(4) for b in range(4)}
    assert {(a.ranks, b.ranks) for a, b in fp32} == {(a, b) for a in (1, 2) for b in (1, 2)}
    assert (
        {(a.zero, a.ranks) for a, _ in fp32}
        == {(b.zero, b.ranks) for _, b in fp32}
        == {(zero, ranks) for zero in range(4) for ranks in (1, 2)}
    )


def test_at_zero_0_a_rank_more_gets_the_same_bits_in_8_bits_too(outcomes: Outcomes) -> None:
    each = change(0, 1, 0, 2, optimizer="adamw_8bit")
    first, second = (outcomes.loaded(each) / "trainer" / f"rank_{rank}.safetensors" for rank in (0, 1))
    saved = (outcomes.saved(each) / "trainer" / "rank_0.safetensors").read_bytes()
    assert first.read_bytes() == second.read_bytes() == saved


def test_offsets_shifted_by_one_would_be_seen(outcomes: Outcomes) -> None:
    before, after = outcomes.saved(SHIFTED), outcomes.loaded(SHIFTED)
    for moment in (None, *MOMENTS["adamw"]):
        saved, loaded = whole(before, SHIFTED.source, moment), whole(after, SHIFTED.target, moment)
        assert not all(torch.equal(saved[name], loaded[name]) for name in saved), moment
    assert outcomes.next_step(SHIFTED) > STEP_LIMITS["bfloat16"]


def test_moments_that_are_left_out_would_be_seen(outcomes: Outcomes) -> None:
    assert norm(whole(outcomes.loaded(FORGOTTEN), FORGOTTEN.target, "exp_avg")) == 0
    assert outcomes.next_step(FORGOTTEN) > STEP_LIMITS["bfloat16"]
