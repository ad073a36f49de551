"""The learner's pure parts: the loss, advantages, the learning rate, micro-batches, and the policy's log-probs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.schema import Learner
from learner import policy as policy_module
from learner.advantages import group_advantages
from learner.batching import MicroBatch, Sequence, build, micro_batches, plan_rows, sequence_mean_weights, share_of_rank
from learner.objectives import Clip, LossInputs, grpo
from learner.policy import LogProbHead, Policy, load_policy
from learner.schedule import learning_rate, warmup_updates
from tests.plain_grpo import PlainCompletion, plain_grpo
from tests.tiny import as_sampled, open_plain, plain_logprobs, tiny_completions, tiny_llama

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=7)
SEEDS = st.integers(0, 2**31)


# -- the loss -------------------------------------------------------------------------------------


def loss_difference(lengths: list[int], seed: int, clip: Clip, beta: float, objective: Any = grpo) -> float:
    """Largest difference of value or gradient from the plain reference, relative to the sum of its terms."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    logprobs = -3 * torch.rand(tokens, generator=draw, dtype=torch.float64)
    old = logprobs + 0.4 * torch.randn(tokens, generator=draw, dtype=torch.float64)
    reference = logprobs + 0.4 * torch.randn(tokens, generator=draw, dtype=torch.float64) if beta else None
    advantages = torch.randn(len(lengths), generator=draw, dtype=torch.float64)
    counts = torch.tensor(lengths)
    logprobs.requires_grad_()
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        reference_logprobs=reference,
        advantages=advantages.repeat_interleave(counts),
        weights=(1.0 / (counts.double() * len(lengths))).repeat_interleave(counts),
    )
    loss, _ = objective(inputs, clip, beta)
    loss.backward()

    def rows(values: Tensor) -> list[list[float]]:
        return [row.tolist() for row in values.detach().split(lengths)]

    references = [None] * len(lengths) if reference is None else rows(reference)
    completions = [
        PlainCompletion(*parts)
        for parts in zip(rows(logprobs), rows(old), references, advantages.tolist(), strict=True)
    ]
    plain = plain_grpo(completions, clip.low, clip.high, beta)
    assert logprobs.grad is not None
    gradient = torch.tensor([slope for row in plain.gradient for slope in row], dtype=torch.float64)
    off = float((logprobs.grad - gradient).abs().sum())
    return max(abs(loss.item() - plain.value), off) / plain.scale


@given(LENGTHS, SEEDS, st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.sampled_from([0.0, 0.04, 1.0]))
@settings(max_examples=100, deadline=None)
def test_the_loss_and_its_gradient_are_the_papers(
    lengths: list[int], seed: int, low: float, high: float, beta: float
) -> None:
    assert loss_difference(lengths, seed, Clip(low, high), beta) <= 1e-9


@pytest.mark.parametrize(
    "fault",
    [
        lambda inputs, clip, beta: grpo(inputs, Clip(clip.high, clip.low), beta),
        lambda inputs, clip, beta: grpo(inputs, clip, -beta),
        lambda inputs, clip, beta: grpo(
            replace(inputs, weights=torch.full_like(inputs.weights, 1 / len(inputs.weights))), clip, beta
        ),
    ],
    ids=["clip bounds swapped", "KL with the wrong sign", "mean over tokens"],
)
def test_the_comparison_sees_a_wrong_loss(fault: Any) -> None:
    assert loss_difference([3, 9, 5], 0, Clip(0.1, 0.4), 0.1) <= 1e-9
    assert loss_difference([3, 9, 5], 0, Clip(0.1, 0.4), 0.1, fault) > 1e-3


def test_the_statistics_are_the_weighted_kl_and_the_number_of_clipped_tokens() -> None:
    ratios = torch.tensor([0.5, 0.85, 1.0, 1.25, 2.0, 0.5, 2.0], dtype=torch.float64)
    inputs = LossInputs(
        logprobs=ratios.log(),
        old_logprobs=torch.zeros_like(ratios),
        reference_logprobs=torch.zeros_like(ratios),
        advantages=torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64),
        weights=torch.full_like(ratios, 0.1),
    )
    _, statistics = grpo(inputs, Clip(0.2, 0.3), 0.5)
    assert int(statistics["clipped"]) == 2  # 0.5 with a negative advantage, 2.0 with a positive one
    kl = sum(0.1 * (1 / r - math.log(1 / r) - 1) for r in ratios.tolist())
    assert float(statistics["kl"]) == pytest.approx(kl, rel=1e-12)


# -- advantages -----------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(2, 8), st.sampled_from([0.1 + 0.2, 1 / 3, 1.2, 0.0, -1e9, 1e-12]))
@settings(deadline=None)
def test_equal_rewards_give_exact_zeros(prompts: int, group: int, reward: float) -> None:
    assert not group_advantages(np.full((prompts, group), reward)).any()


@given(st.integers(1, 5), st.integers(2, 8), SEEDS)
@settings(deadline=None)
def test_advantages_have_mean_zero_and_unit_deviation_in_each_group(prompts: int, group: int, seed: int) -> None:
    rewards = np.random.default_rng(seed).normal(3.0, 2.0, (prompts, group))
    advantages = group_advantages(rewards)
    assert advantages.dtype == np.float32 and advantages.shape == rewards.shape
    np.testing.assert_allclose(advantages.mean(axis=1), 0.0, atol=1e-6)
    for row, group_rewards in zip(advantages, rewards, strict=True):
        mean = sum(group_rewards) / group
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group_rewards) / (group - 1))
        if deviation > 0.1:  # below it the epsilon in the denominator shows
            np.testing.assert_allclose(row, (group_rewards - mean) / deviation, rtol=1e-4, atol=1e-6)


def test_a_group_without_spread_does_not_touch_its_neighbours() -> None:
    rewards = np.array([[0.3, 0.3, 0.1 + 0.2], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    advantages = group_advantages(rewards)
    assert advantages[0].any()  # 0.1 + 0.2 is not 0.3: equality is exact
    assert not advantages[1].any()
    assert advantages[2].tolist() == group_advantages(rewards[2:])[0].tolist()


# -- the learning rate ----------------------------------------------------------------------------


def rates(total: int, **options: object) -> list[float]:
    learner = Learner.model_validate({"learning_rate": 2.0, **options})
    return [learning_rate(learner, update, total) for update in range(total + 3)]


def test_a_constant_rate_is_kept() -> None:
    assert rates(5) == [2.0] * 8


def test_a_linear_rate_falls_evenly_to_the_floor_and_stays_there() -> None:
    values = rates(10, schedule="linear", min_learning_rate_ratio=0.1)
    assert values[0] == 2.0
    assert np.diff(values[:11]) == pytest.approx([-0.18] * 10)
    assert values[10:] == pytest.approx([0.2] * 3)


def test_a_cosine_rate_falls_over_half_a_wave_to_the_floor() -> None:
    values = rates(10, schedule="cosine", min_learning_rate_ratio=0.25)
    assert values[0] == 2.0
    assert values[5] == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert values[10:] == pytest.approx([0.5] * 3)
    assert all(after < before for before, after in pairwise(values[:11]))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [4, 0.4])
def test_the_warm_up_rises_evenly_by_steps_or_share_and_ends_at_the_peak(schedule: str, warmup: float) -> None:
    values = rates(10, schedule=schedule, warmup=warmup)
    assert values[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert values[4] == pytest.approx(2.0)  # the schedule starts at the peak
    assert values[10] == pytest.approx(2.0 if schedule == "constant" else 0.0)


def test_a_warm_up_of_one_is_one_step_and_one_as_long_as_the_run_ends_at_the_peak() -> None:
    assert warmup_updates(1.0, 10) == 1
    assert warmup_updates(0.04, 10) == 0
    assert rates(4, warmup=4, schedule="cosine")[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


# -- micro-batches --------------------------------------------------------------------------------


@given(st.integers(1, 20), SEEDS, st.integers(1, 120), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_sequence_is_in_one_micro_batch_of_one_rank_within_the_budget(
    count: int, seed: int, budget: int, ranks: int
) -> None:
    sequences = tiny_completions(seed, count)
    shares = [micro_batches(sequences, budget, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    held = [sorted(set(batch.sequence.tolist()) - {-1}) for batch in batches]
    assert sorted(index for indices in held for index in indices) == list(range(count))
    for batch, indices in zip(batches, held, strict=True):
        assert len(indices) <= 1 or batch.input_ids.numel() <= budget
    total = sum(float(batch.weights.double().sum()) for batch in batches)
    assert total == pytest.approx(1.0, rel=1e-6)


@given(st.integers(1, 8), SEEDS, st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_token_of_a_micro_batch_is_where_a_naive_walk_finds_it(count: int, seed: int, old: bool) -> None:
    random = np.random.default_rng(seed)
    sequences = [
        replace(
            s,
            sampler_logprobs=random.normal(size=len(s.completion_ids)).astype(np.float32),
            old_logprobs=random.normal(size=len(s.completion_ids)).astype(np.float32) if old else None,
        )
        for s in tiny_completions(seed, count)
    ]
    indices = random.permutation(count)[: random.integers(1, count + 1)].tolist()
    weights = sequence_mean_weights(sequences)
    batch = build(sequences, indices, weights)
    place = 0
    for row, index in enumerate(indices):
        s = sequences[index]
        whole = [*s.prompt_ids.tolist(), *s.completion_ids.tolist()]
        assert batch.input_ids[row].tolist() == whole + [0] * (batch.input_ids.shape[1] - len(whole))
        for t, token in enumerate(s.completion_ids.tolist()):
            assert (int(batch.rows[place]), int(batch.targets[place])) == (row, token)
            assert int(batch.positions[place]) == len(s.prompt_ids) + t - 1
            assert int(batch.sequence[place]) == index
            assert float(batch.sampler_logprobs[place]) == s.sampler_logprobs[t]
            assert batch.old_logprobs is None or float(batch.old_logprobs[place]) == s.old_logprobs[t]  # type: ignore[index]
            assert float(batch.advantages[place]) == np.float32(s.advantage)
            assert float(batch.weights[place]) == pytest.approx(1 / (len(s.completion_ids) * count), rel=1e-6)
            place += 1
    assert place == len(batch.targets)
    assert (batch.old_logprobs is not None) is old


def test_a_rank_without_a_share_gets_a_dummy_that_weighs_nothing_and_is_no_sequence() -> None:
    sequences = tiny_completions(0, 3)
    batches = micro_batches(sequences, 1, 1, 2)
    assert [len(share_of_rank(plan_rows([9, 8, 7], 1), rank, 2)) for rank in (0, 1)] == [2, 2]
    assert batches[-1].weights.tolist() == [0.0] and batches[-1].sequence.tolist() == [-1]
    assert batches[-1].advantages.tolist() == [0.0]


# -- the policy's log-probs -----------------------------------------------------------------------

TEMPERATURE = 0.7


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), tied=request.param)


def policy_logprobs(policy: Policy, batch: MicroBatch) -> dict[int, Tensor]:
    """Log-probs of every sequence of a micro-batch."""
    values, _ = policy(batch.input_ids, batch.rows, batch.positions, batch.targets, TEMPERATURE)
    return {index: values[batch.sequence == index] for index in batch.sequence.unique().tolist()}


def together(sequences: list[Sequence], indices: list[int]) -> MicroBatch:
    return build(sequences, indices, sequence_mean_weights(sequences))


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_log_probs_are_those_of_plain_transformers_for_every_chunk_size(folder: Path, chunk: int) -> None:
    sequences = tiny_completions(1)
    model, policy = open_plain(folder), load_policy(folder, "float32", chunk, gradient_checkpointing=False)
    found = policy_logprobs(policy, together(sequences, list(range(len(sequences)))))
    for index, sequence in enumerate(sequences):
        expected = plain_logprobs(model, sequence, TEMPERATURE).detach()
        assert float((found[index].detach() - expected).abs().max() / expected.abs().max()) <= 1e-6


def test_entropies_are_those_of_the_tempered_distribution(folder: Path) -> None:
    sequence = tiny_completions(2, 1)[0]
    batch = together([sequence], [0])
    policy = load_policy(folder, "float32", 3, gradient_checkpointing=False)
    _, entropies = policy(batch.input_ids, batch.rows, batch.positions, batch.targets, TEMPERATURE)
    logits = open_plain(folder)(input_ids=batch.input_ids).logits[0, batch.positions] / TEMPERATURE
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-5, atol=0)
    assert not entropies.requires_grad


def test_log_probs_do_not_depend_on_padding_or_on_who_shares_the_micro_batch(folder: Path) -> None:
    sequences = tiny_completions(3)
    policy = load_policy(folder, "float32", 16, gradient_checkpointing=False)
    shared = policy_logprobs(policy, together(sequences, list(range(len(sequences)))))
    for index in range(len(sequences)):
        alone = policy_logprobs(policy, together(sequences, [index]))
        torch.testing.assert_close(alone[index], shared[index], rtol=0, atol=3e-6)


def test_changing_one_completion_moves_no_other_log_prob_by_a_bit(folder: Path) -> None:
    sequences = tiny_completions(4)
    everyone = list(range(len(sequences)))
    policy = load_policy(folder, "float32", 16, gradient_checkpointing=False)
    before = policy_logprobs(policy, together(sequences, everyone))
    changed = list(sequences)
    changed[2] = replace(sequences[2], completion_ids=(sequences[2].completion_ids + 5) % 50)
    after = policy_logprobs(policy, together(changed, everyone))
    assert not torch.equal(before[2], after[2])
    assert all(torch.equal(before[i], after[i]) for i in everyone if i != 2)


def gradients(folder: Path, chunk: int, gradient_checkpointing: bool) -> dict[str, Tensor]:
    sequences = as_sampled(tiny_completions(5), folder, TEMPERATURE)
    policy = load_policy(folder, "float32", chunk, gradient_checkpointing)
    batch = together(sequences, list(range(len(sequences))))
    values, _ = policy(batch.input_ids, batch.rows, batch.positions, batch.targets, TEMPERATURE)
    (batch.weights * batch.advantages * values).sum().backward()
    return {name: p.grad for name, p in policy.named_weights().items() if p.grad is not None}


def test_gradient_checkpointing_changes_no_bit_of_the_gradient(folder: Path) -> None:
    with_it, without = gradients(folder, 16, True), gradients(folder, 16, False)
    assert with_it.keys() == without.keys() == dict(open_plain(folder).named_parameters()).keys()
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_the_gradient_does_not_depend_on_the_chunk_size(folder: Path) -> None:
    small, large = gradients(folder, 3, True), gradients(folder, 4096, True)
    for name in large:
        assert float((small[name] - large[name]).norm() / large[name].norm()) <= 1e-5, name


def test_a_model_that_caps_its_logits_is_refused(folder: Path) -> None:
    model = open_plain(folder)
    model.config.final_logit_softcapping = 30.0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Policy(model, 16)


# -- memory ---------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Follows every tensor made while it is active; `peak` is the most bytes that were alive after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def head_memory(chunk: int, tokens: int, vocabulary: int = 50_000, width: int = 8) -> tuple[int, int]:
    """(bytes saved for the backward pass, peak of bytes alive over forward and backward) of the log-prob head."""
    head = LogProbHead(torch.nn.Parameter(torch.randn(vocabulary, width)), None, chunk)
    hidden = torch.randn(tokens, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with LiveBytes() as live:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs, _ = head(hidden, targets, 1.0)
        logprobs.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.any())
    return sum(saved.values()), live.peak


def test_the_logits_alive_at_a_time_are_those_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    token = 50_000 * 4  # bytes of the logits of one token
    saved, peak = head_memory(chunk=64, tokens=1024)
    assert saved < 0.05 * 1024 * token
    assert peak < 0.5 * 1024 * token
    _, half = head_memory(chunk=64, tokens=512)
    assert peak < 1.05 * half  # does not grow with the tokens
    # What the two measures say where all logits are alive, and where they are kept for the backward pass:
    assert head_memory(chunk=256, tokens=256)[1] > 2 * 256 * token
    monkeypatch.setattr(policy_module, "checkpoint", lambda function, *given, use_reentrant: function(*given))
    assert head_memory(chunk=64, tokens=128)[0] >= 128 * token
