"""The policy's log-probs: those of plain transformers, packed or alone, in any chunks; and what they keep alive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tests.plain_varlen  # noqa: F401  the variable-length kernel on a CPU
from learner import policy as policy_module
from learner.batching import MicroBatch, Rows, Sequence, build, token_weights
from learner.policy import LogProbHead, Policy, SampledFrom, load_policy
from learner.varlen_attention import VARLEN
from tests.tiny import as_sampled, open_plain, plain_logprobs, tiny_completions, tiny_llama, tiny_sliding

TEMPERATURE = 0.7
TEMPERED = SampledFrom(TEMPERATURE)
PACKED: Rows = [[0, 1, 2], [3, 4], [5], [6, 7]]
PADDED: Rows = [[index] for index in range(8)]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), tied=request.param)


# Attention by SDPA, by the variable-length kernel as the tests have it on a CPU, and by torch's where there is a GPU.
ATTENTIONS = [
    "sdpa",
    "varlen",
    "varlen bfloat16",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
LIMITS = {"sdpa": 1e-6, "varlen": 1e-6, "varlen bfloat16": 0.03, "cuda": 0.03}  # from plain transformers in float32


def open_policy(folder: Path, attention: str, chunk: int = 16, gradient_checkpointing: bool = False) -> Policy:
    if attention == "cuda":
        return load_policy(folder, "bfloat16", chunk, gradient_checkpointing, device="cuda").cuda()
    dtype = "bfloat16" if attention.endswith("bfloat16") else "float32"
    policy = load_policy(folder, dtype, chunk, gradient_checkpointing)
    if attention != "sdpa":
        policy.model.set_attn_implementation(VARLEN)
    return policy


def together(sequences: list[Sequence], rows: Rows) -> MicroBatch:
    return build(sequences, rows, token_weights(sequences, "sequence", 0.0, False))


def forward(policy: Policy, batch: MicroBatch, sampled_from: SampledFrom = TEMPERED) -> tuple[Tensor, Tensor]:
    batch = batch.to(policy.log_prob_head.weight.device)
    return policy(batch.input_ids, batch.position_ids, batch.rows, batch.columns, batch.targets, sampled_from)


def by_sequence(policy: Policy, batch: MicroBatch, sampled_from: SampledFrom = TEMPERED) -> dict[int, Tensor]:
    """Log-probs of every sequence of a micro-batch."""
    values = forward(policy, batch, sampled_from)[0].detach().cpu()
    return {index: values[batch.sequence == index] for index in batch.sequence.unique().tolist()}


# -- log-probs ------------------------------------------------------------------------------------


def worst_difference(found: dict[int, Tensor], model: torch.nn.Module, sequences: list[Sequence]) -> float:
    """From plain transformers, one sequence at a time, relative to the sequence's largest log-prob."""
    differences = []
    for index, sequence in enumerate(sequences):
        expected = plain_logprobs(model, sequence, TEMPERATURE).detach()
        differences.append((found[index] - expected).abs().max() / expected.abs().max())
    return float(torch.stack(differences).max())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("rows", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_log_probs_are_those_of_plain_transformers_for_every_chunk_size(
    folder: Path, chunk: int, rows: Rows, attention: str
) -> None:
    sequences = tiny_completions(1)
    model, policy = open_plain(folder), open_policy(folder, attention, chunk)
    assert worst_difference(by_sequence(policy, together(sequences, rows)), model, sequences) <= LIMITS[attention]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sliding_window_and_shared_key_heads_are_those_of_plain_transformers(tmp_path: Path, attention: str) -> None:
    sequences = tiny_completions(1)
    folder = tiny_sliding(tmp_path, window=5)
    policy = open_policy(folder, attention)
    found = by_sequence(policy, together(sequences, PACKED))
    assert worst_difference(found, open_plain(folder), sequences) <= LIMITS[attention]
    policy.model.config.sliding_window = None
    without = by_sequence(policy, together(sequences, PACKED))
    assert worst_difference(without, open_plain(folder), sequences) > 2 * LIMITS[attention]


def test_the_comparison_sees_a_missing_temperature(folder: Path) -> None:
    sequences = tiny_completions(1)
    policy = load_policy(folder, "float32", 16, gradient_checkpointing=False)
    found = by_sequence(policy, together(sequences, PACKED), SampledFrom(1.0))
    assert worst_difference(found, open_plain(folder), sequences) > 1e-2


def test_entropies_are_those_of_the_tempered_distribution(folder: Path) -> None:
    sequence = tiny_completions(2, 1)[0]
    batch = together([sequence], [[0]])
    _, entropies = forward(load_policy(folder, "float32", 3, gradient_checkpointing=False), batch)
    logits = open_plain(folder)(input_ids=batch.input_ids).logits[0, batch.columns] / TEMPERATURE
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-5, atol=0)
    assert not entropies.requires_grad


def test_a_model_that_caps_its_logits_is_refused(folder: Path) -> None:
    model = open_plain(folder)
    model.config.final_logit_softcapping = 30.0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Policy(model, 16)


# -- sequences of one row do not see each other ---------------------------------------------------


def moved_with(policy: Policy, edit: Callable[[MicroBatch], MicroBatch] = lambda batch: batch) -> set[int]:
    """Changes the tokens of one sequence after the other; the sequences whose log-probs another one's change moved."""
    sequences = tiny_completions(4)
    before = by_sequence(policy, edit(together(sequences, PACKED)))
    moved = set()
    for index, s in enumerate(sequences):
        changed = list(sequences)
        changed[index] = replace(s, prompt_ids=(s.prompt_ids + 7) % 50, completion_ids=(s.completion_ids + 5) % 50)
        after = by_sequence(policy, edit(together(changed, PACKED)))
        assert not torch.equal(before[index], after[index])
        moved |= {other for other in before if other != index and not torch.equal(before[other], after[other])}
    return moved


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_changing_one_sequence_moves_no_log_prob_of_another_by_a_bit(
    folder: Path, gradient_checkpointing: bool, attention: str
) -> None:
    policy = open_policy(folder, attention, gradient_checkpointing=gradient_checkpointing)
    assert moved_with(policy) == set()


BEHIND_OTHERS = {1, 2, 4, 7}  # in the rows of PACKED
BEHIND_ANY = {1, 2, 3, 4, 5, 6, 7}  # in all rows, one after another


def positions_run_on(batch: MicroBatch) -> MicroBatch:
    rows, length = batch.input_ids.shape
    return replace(batch, position_ids=torch.arange(length).repeat(rows, 1))


def decode_with(policy: Policy, monkeypatch: pytest.MonkeyPatch, **arguments: Callable[[Tensor], Any]) -> None:
    """Plants arguments, made of the input ids, into every call of the decoder."""
    decoder = policy.model.get_decoder()

    def planted(input_ids: Tensor, **others: Any) -> Any:
        return decoder(input_ids=input_ids, **(others | {name: make(input_ids) for name, make in arguments.items()}))

    monkeypatch.setattr(policy.model, "get_decoder", lambda: planted)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("fault", ["positions run on", "attention mask of ones", "cache"])
def test_attention_across_sequences_is_seen(
    folder: Path, gradient_checkpointing: bool, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(folder, "float32", 16, gradient_checkpointing)
    if fault == "positions run on":
        assert moved_with(policy, positions_run_on) == BEHIND_OTHERS
    elif fault == "attention mask of ones":
        decode_with(policy, monkeypatch, attention_mask=torch.ones_like)
        assert moved_with(policy) == BEHIND_OTHERS
    else:
        decode_with(policy, monkeypatch, use_cache=lambda _: True)
        # Under gradient checkpointing transformers turns the cache off by itself.
        assert moved_with(policy) == (set() if gradient_checkpointing else BEHIND_OTHERS)


def one_sequence(input_ids: Tensor) -> Tensor:
    """Bounds that take all rows for one sequence."""
    return torch.tensor([0, input_ids.numel()], dtype=torch.int32, device=input_ids.device)


def one_a_row(input_ids: Tensor) -> Tensor:
    """Bounds that take every row for one sequence."""
    rows, length = input_ids.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=input_ids.device) * length


@pytest.mark.parametrize("attention", ATTENTIONS[1:])
def test_wrong_bounds_of_the_variable_length_kernel_are_seen(
    folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = open_policy(folder, attention)
    assert moved_with(policy, positions_run_on) == BEHIND_OTHERS
    for bounds, moved in ((one_a_row, BEHIND_OTHERS), (one_sequence, BEHIND_ANY)):
        with monkeypatch.context() as planted:
            decode_with(policy, planted, cu_seq_lens_q=bounds, max_length_q=Tensor.numel)
            assert moved_with(policy) == moved


def test_what_the_variable_length_kernel_does_not_compute_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = open_policy(folder, "varlen")
    decode_with(policy, monkeypatch, softcap=lambda _: 30.0)
    with pytest.raises(ValueError, match=r"asks for softcap.*model\.dtype=float32"):
        forward(policy, together(tiny_completions(1), PACKED))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_is_for_16_bits_on_a_gpu_and_no_saved_model_names_it(folder: Path, dtype: str) -> None:
    for device in ("cpu", "cuda"):
        config = load_policy(folder, dtype, 16, gradient_checkpointing=False, device=device).model.config
        assert (config._attn_implementation == VARLEN) == (device == "cuda" and dtype == "bfloat16")
        assert VARLEN not in config.to_json_string(use_diff=False)


# -- gradients ------------------------------------------------------------------------------------


def gradients(
    folder: Path,
    chunk: int = 16,
    gradient_checkpointing: bool = False,
    rows: Rows = PACKED,
    attention: str = "sdpa",
) -> dict[str, Tensor]:
    sequences = as_sampled(tiny_completions(5), folder, TEMPERATURE)
    policy = open_policy(folder, attention, chunk, gradient_checkpointing)
    batch = together(sequences, rows)
    (batch.weights * batch.advantages * forward(policy, batch)[0].cpu()).sum().backward()
    return {name: p.grad.cpu().float() for name, p in policy.named_weights().items() if p.grad is not None}


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_gradient_checkpointing_changes_no_bit_of_the_gradient(folder: Path, attention: str) -> None:
    with_it = gradients(folder, gradient_checkpointing=True, attention=attention)
    without = gradients(folder, attention=attention)
    assert with_it.keys() == without.keys() == dict(open_plain(folder).named_parameters()).keys()
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_the_gradient_does_not_depend_on_the_chunk_size(folder: Path) -> None:
    assert relative(gradients(folder, chunk=3, gradient_checkpointing=True), gradients(folder, chunk=4096)) <= 1e-5


GRADIENT_LIMITS = {"sdpa": 1e-5, "varlen": 1e-5, "varlen bfloat16": 0.1, "cuda": 0.1}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_gradient_of_packed_rows_is_that_of_plain_transformers_one_sequence_at_a_time(
    folder: Path, attention: str
) -> None:
    model, sequences = open_plain(folder), tiny_completions(5)
    for s in sequences:
        weight = s.advantage / len(s.completion_ids) / len(sequences)
        (weight * plain_logprobs(model, s, TEMPERATURE)).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rows in (PACKED, PADDED):
        assert relative(gradients(folder, rows=rows, attention=attention), expected) <= GRADIENT_LIMITS[attention]


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
            logprobs, _ = head(hidden, targets, SampledFrom())
        logprobs.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.any())
    return sum(saved.values()), live.peak


def test_the_logits_alive_at_a_time_are_those_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    token = 50_000 * 4  # bytes of the logits of one token
    saved, peak = head_memory(chunk=64, tokens=1024)
    assert saved < 1.2 * 64 * token  # the last chunk's
    assert peak < 0.5 * 1024 * token
    _, half = head_memory(chunk=64, tokens=512)
    assert peak < 1.05 * half  # does not grow with the tokens
    # What the two measures say where all logits are alive, and where they are kept for the backward pass:
    assert head_memory(chunk=256, tokens=256)[1] > 2 * 256 * token
    monkeypatch.setattr(policy_module, "checkpoint", lambda function, *given, use_reentrant: function(*given))
    assert head_memory(chunk=64, tokens=128)[0] >= 128 * token
