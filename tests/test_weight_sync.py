"""After a weight sync vLLM samples with just the learner's weights, and every planted fault is seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from actors.engine import Engine, EngineOptions, Sampling
from cluster import weight_loading, weight_receiver
from cluster.weight_loading import StraightLoad, VllmReload
from cluster.weight_sender import aligned_bytes, plan_buckets
from cluster.weight_sender_cpu import HALVES, SharedMemorySender
from cluster.weight_transport import SHARED_MEMORY, WORKER_EXTENSION
from configs.schema import Rollout, WarmStart
from data.records import Completion
from data.tokenizer import build_tokenizer
from learner.batching import Sequence, micro_batches
from learner.policy import Policy, SampledFrom, load_policy
from learner.push_check import WORST_TOKEN
from learner.warm_start import build_llama
from learner.whole_weights import NamedTensors, Shapes, WholeWeights

MEAN_LIMIT, MAX_LIMIT = Rollout().logprob_diff, WORST_TOKEN * Rollout().logprob_diff
FP32_MEAN, FP32_MAX, BF16_MEAN = 1e-5, 1e-3, 0.1
BUCKET_BYTES = 40_000
PROMPT = [2, *range(8, 20)]
LONG_PROMPT = [2, *(8 + i % 12 for i in range(79))]
SAMPLED = Sampling(temperature=0.8, max_completion_tokens=12)
TEMPERED = SampledFrom(0.8)
GREEDY = Sampling(temperature=0.0, max_completion_tokens=12)


def make_model(folder: Path, tied: bool, seed: int) -> Path:
    """A random two-layer Llama; a large spread of weights makes wrong ones show."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    llama = build_llama(WarmStart(hidden_size=64, layers=2, tied_embeddings=tied), tokenizer)
    return save_spread(llama, tokenizer, folder)


def save_spread(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Tamper = Callable[[NamedTensors], NamedTensors]


class Given(WholeWeights):
    """What a test wants sent: tensors of its own, tampered with."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.rank = 0
        self.tensors = tensors
        self.tamper: Tamper = list

    @property
    def shapes(self) -> Shapes:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def buckets(self, plan: list[list[str]]) -> Iterator[NamedTensors]:
        for names in plan:
            yield self.tamper([(name, self.tensors[name]) for name in names])


class Rig:
    """An engine with old weights, a policy with new ones, and a sender between them, in one process."""

    def __init__(
        self, old: Path, new: Path, bucket_bytes: int, tensor_parallel: int = 1, dtype: str = "float32"
    ) -> None:
        self.old, self.new = old, new
        self.engine = Engine(engine_options(old, tensor_parallel, dtype))
        self.calls: list[str] = []
        self.sender = SharedMemorySender(self.call, bucket_bytes)
        self.policy = self.load(self.new, dtype)
        self.given = Given(dict(self.policy.named_weights()))
        self.sender.open(self.given)

    @staticmethod
    def load(folder: Path, dtype: str = "float32") -> Policy:
        return load_policy(folder, dtype, 64, gradient_checkpointing=False).requires_grad_(False)

    def call(self, method: str, arguments: Any) -> list[Any]:
        self.calls.append(method)
        arguments = dict(arguments)
        version = arguments.pop("version", None)
        self.engine.weight_transfer(method, **arguments)
        if version is not None:
            self.engine.set_version(version)
        return [self.engine.update_seconds()]

    def sync(self, policy: Policy, tamper: Tamper = list) -> dict[str, float]:
        self.given.tamper = tamper
        return self.send(dict(policy.named_weights()))

    def send(self, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        self.given.tensors = tensors
        return self.sender.send(self.engine.version + 1)

    def sample(self, prompt: list[int], sampling: Sampling, count: int = 8) -> list[Completion]:
        for index in range(count):
            self.engine.add(f"r{self.engine.version}-{index}-{len(self.calls)}", index, prompt, 100 + index, sampling)
        finished: dict[int, Completion] = {}
        while self.engine.busy:
            finished |= {completion.index: completion for _, completion in self.engine.step()}
        return [finished[index] for index in range(count)]


def engine_options(model: Path, tensor_parallel: int = 1, dtype: str = "float32") -> EngineOptions:
    return EngineOptions(
        model, dtype, 128, 64, 32, 64 << 20, SHARED_MEMORY, WORKER_EXTENSION, tensor_parallel=tensor_parallel
    )


def difference(
    policy: Policy, prompt: list[int], completions: list[Completion], sampled_from: SampledFrom
) -> np.ndarray:
    """|vLLM's - the learner's| log-prob of every sampled token: what every run checks after a sync."""
    sequences = [Sequence(np.array(prompt), c.token_ids, c.logprobs, 0.0) for c in completions]
    everyone = list(range(len(sequences)))
    (batch,) = micro_batches(sequences, [1.0] * len(sequences), everyone, 10**6, packing=True, rank=0, ranks=1)
    logprobs, _ = policy(batch.input_ids, batch.position_ids, batch.rows, batch.columns, batch.targets, sampled_from)
    return (logprobs - batch.sampler_logprobs).abs().numpy()


def healthy(diff: np.ndarray) -> bool:
    return diff.mean() < FP32_MEAN and diff.max() < FP32_MAX


def stops_the_run(diff: np.ndarray) -> bool:
    """The rule of LearnerRank._check with the default limits."""
    return bool(diff.mean() > MEAN_LIMIT or diff.max() > MAX_LIMIT)


@pytest.fixture(scope="module", params=["untied", "tied", "tied, by vLLM's reload"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    folder, tied = tmp_path_factory.mktemp("models"), request.param != "untied"
    rig = Rig(make_model(folder / "old", tied, 0), make_model(folder / "new", tied, 1), BUCKET_BYTES)
    if request.param.endswith("reload"):
        use_vllms_reload(rig)
    return rig


def receiver(rig: Rig) -> weight_receiver.SharedMemoryEngine:
    (engine,) = rig.engine._engine.collective_rpc(lambda worker: worker.weight_transfer_engine)
    assert isinstance(engine, weight_receiver.SharedMemoryEngine)
    return engine


def use_vllms_reload(rig: Rig) -> None:
    engine = receiver(rig)
    engine._loading = VllmReload(engine.model, engine.model_config)


def test_after_a_sync_sampled_logprobs_are_the_learners(rig: Rig) -> None:
    before = rig.sample(PROMPT, SAMPLED)
    assert stops_the_run(difference(rig.policy, PROMPT, before, TEMPERED)), "old and new weights must differ visibly"
    rig.sync(rig.policy)
    after = rig.sample(PROMPT, SAMPLED)
    assert healthy(difference(rig.policy, PROMPT, after, TEMPERED))
    assert {int(version) for completion in after for version in completion.versions} == {rig.engine.version}


def test_after_a_sync_greedy_output_is_that_of_transformers(rig: Rig) -> None:
    rig.sync(rig.policy)
    (completion,) = rig.sample(PROMPT, GREEDY, count=1)
    model = AutoModelForCausalLM.from_pretrained(rig.new, dtype=torch.float32)
    generated = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :]
    assert completion.token_ids.tolist() == generated.tolist()


def test_the_temperature_of_the_sampler_matters(rig: Rig) -> None:
    rig.sync(rig.policy)
    completions = rig.sample(PROMPT, SAMPLED)
    assert stops_the_run(difference(rig.policy, PROMPT, completions, SampledFrom(1.0)))


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 1.0), (0, 0.9), (50, 0.9), (5, 0.5)])
def test_top_k_and_top_p_log_probs_are_the_learners(rig: Rig, top_k: int, top_p: float) -> None:
    """At k = 50 of 107 tokens and further; a learner that does not mask, or orders the two otherwise, shows."""
    rig.sync(rig.policy)
    completions = rig.sample(PROMPT, Sampling(1.5, 12, top_k, top_p), count=32)
    assert healthy(difference(rig.policy, PROMPT, completions, SampledFrom(1.5, top_k, top_p)))
    assert stops_the_run(difference(rig.policy, PROMPT, completions, SampledFrom(1.5)))
    if top_k and top_p < 1.0:
        assert stops_the_run(difference(rig.policy, PROMPT, completions, SampledFrom(1.5, top_k)))


def test_a_stale_tied_head_stops_the_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.sync(rig.load(rig.old))
    monkeypatch.setattr(weight_receiver.WholeUpdates, "_refresh_tied_head", lambda self: None)
    rig.sync(rig.policy)
    diff = difference(rig.policy, PROMPT, rig.sample(PROMPT, SAMPLED), TEMPERED)
    tied = rig.policy.model.config.tie_word_embeddings
    assert stops_the_run(diff) if tied else healthy(diff)


def test_what_is_kept_of_a_bucket_must_be_copied(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers lie across buckets here, and by the time they are complete the memory holds other tensors."""
    monkeypatch.setattr(type(receiver(rig)._loading), "keep", lambda self, weights: None)
    rig.sync(rig.load(rig.old))
    rig.sync(rig.policy)
    assert stops_the_run(difference(rig.policy, PROMPT, rig.sample(PROMPT, SAMPLED), TEMPERED))


@pytest.mark.parametrize(
    ("model", "tied", "dtype"),
    [
        ("llama", False, "float32"),
        ("qwen2", False, "float32"),
        ("qwen3", False, "float32"),
        ("qwen2", True, "float32"),
        ("qwen2", True, "bfloat16"),
    ],
)
@pytest.mark.parametrize("bucket_bytes", [BUCKET_BYTES, 10**7])
def test_loading_straight_is_bit_for_bit_vllms_reload(
    model: str, tied: bool, dtype: str, bucket_bytes: int, tmp_path: Path
) -> None:
    """Qwen2 has biases, Qwen3 norms of queries and keys, and vLLM pads the vocabulary of each; vLLM 0.26 takes the
    embedding itself for a tied head of theirs. In small buckets a layer's parts come apart; in a large one they lie in
    a row. The second sync finds weights that the first has packed."""
    old, new = (random_model(tmp_path / str(seed), model, tied, seed) for seed in range(2))
    rig = Rig(old, new, bucket_bytes, dtype=dtype)
    assert isinstance(receiver(rig)._loading, StraightLoad)
    stale = rig.sample(PROMPT, SAMPLED)
    rig.sync(rig.load(rig.old, dtype))
    rig.sync(rig.policy)
    straight = rig.sample(PROMPT, SAMPLED)
    diff = difference(rig.policy, PROMPT, straight, TEMPERED)
    assert healthy(diff) if dtype == "float32" else diff.mean() < BF16_MEAN
    assert difference(rig.policy, PROMPT, stale, TEMPERED).mean() > 10 * BF16_MEAN
    rig.sync(rig.load(rig.old, dtype))
    use_vllms_reload(rig)
    rig.sync(rig.policy)
    for one, other in zip(straight, rig.sample(PROMPT, SAMPLED), strict=True):
        assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.logprobs, other.logprobs)


def random_model(folder: Path, kind: str, tied: bool, seed: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    return save_spread(model, tokenizer, folder)


def test_parts_joined_in_the_wrong_order_stop_the_run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(receiver(rig)._loading, StraightLoad):
        pytest.skip("vLLM's own reload joins them itself")
    joined = weight_loading._joined
    monkeypatch.setattr(weight_loading, "_joined", lambda parts: joined(parts[::-1]))
    rig.sync(rig.policy)
    assert stops_the_run(difference(rig.policy, PROMPT, rig.sample(PROMPT, SAMPLED), TEMPERED))


def test_two_swapped_tensors_stop_the_run(rig: Rig) -> None:
    swap = {
        "model.layers.0.self_attn.q_proj.weight": "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    }
    rig.sync(rig.policy, lambda tensors: [(swap.get(name, name), tensor) for name, tensor in tensors])
    assert stops_the_run(difference(rig.policy, PROMPT, rig.sample(PROMPT, SAMPLED), TEMPERED))


def test_stale_weights_stop_the_run(rig: Rig) -> None:
    rig.sync(rig.load(rig.old))
    assert stops_the_run(difference(rig.policy, PROMPT, rig.sample(PROMPT, SAMPLED), TEMPERED))


def test_old_prefix_blocks_are_not_reused_after_a_sync(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.sync(rig.load(rig.old))
    before = rig.engine.cached_tokens
    rig.sample(LONG_PROMPT, SAMPLED)
    assert rig.engine.cached_tokens > before, "the prefix cache must be at work, or this test proves nothing"
    rig.sync(rig.policy)
    assert healthy(difference(rig.policy, LONG_PROMPT, rig.sample(LONG_PROMPT, SAMPLED), TEMPERED))
    # The planted fault: the salt stays what it was.
    rig.sync(rig.load(rig.old))
    rig.sample(LONG_PROMPT, SAMPLED)
    with monkeypatch.context() as fault:
        fault.setattr(Engine, "set_version", lambda self, version: None)
        rig.sync(rig.policy)
        stale = rig.sample(LONG_PROMPT, SAMPLED)
    assert stops_the_run(difference(rig.policy, LONG_PROMPT, stale, TEMPERED))


def test_weights_change_under_a_running_request_which_finishes(rig: Rig) -> None:
    first = rig.engine.version
    rig.engine.add("in-flight", 0, PROMPT, 7, Sampling(1.0, 40))
    for _ in range(3):
        assert rig.engine.step() == []
    rig.sync(rig.policy)
    finished: list[tuple[str, Completion]] = []
    while rig.engine.busy:
        finished += rig.engine.step()
    versions = finished[0][1].versions.tolist()
    assert versions[:3] == [first] * 3 and set(versions[3:]) <= {first + 1}


def test_a_seeded_completion_does_not_depend_on_who_shares_its_batch(rig: Rig) -> None:
    rig.sync(rig.policy)
    together = rig.sample(PROMPT, SAMPLED, count=12)
    (alone,) = rig.sample(PROMPT, SAMPLED, count=1)
    assert alone.token_ids.tolist() == together[0].token_ids.tolist()
    assert np.array_equal(alone.logprobs, together[0].logprobs)
    assert len({tuple(c.token_ids) for c in together}) > 6, "seeds must differ"


def test_an_update_is_one_start_one_call_a_bucket_and_one_finish(rig: Rig) -> None:
    rig.calls.clear()
    rig.sync(rig.policy)
    buckets = len(plan_buckets(rig.given.shapes, BUCKET_BYTES // HALVES))
    assert buckets > 1
    assert rig.calls == ["start_weight_update", *["update_weights"] * buckets, "finish_weight_update"]


def test_nothing_of_the_bucket_is_left_in_shared_memory(rig: Rig) -> None:
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("pocketgrpo")]


def test_a_missing_tensor_is_an_error(rig: Rig) -> None:
    """Last of those that use the rig: vLLM takes no further update after one that failed."""
    missing = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=r"lacked 1 parameters.*layers\.1\.mlp\.up_proj"):
        rig.sync(rig.policy, lambda tensors: [(n, t) for n, t in tensors if n != missing])


@pytest.mark.parametrize(("learner", "processes", "threads"), [(1, 1, 2), (1, 2, 1), (4, 1, 5), (4, 2, 3)])
def test_who_loads_shares_the_learners_cores(
    monkeypatch: pytest.MonkeyPatch, learner: int, processes: int, threads: int
) -> None:
    """More threads than cores, with two workers on two cores, made an update take more than twice as long."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: learner)
    told: list[Any] = []
    sender = SharedMemorySender(lambda method, arguments: told.append(arguments) or [], BUCKET_BYTES, processes)  # type: ignore[func-returns-value]
    sender.open(Given({"weight": torch.zeros(8)}))
    assert told[0]["init_info"]["threads"] == threads


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(64, 20_000))
def test_buckets_hold_every_parameter_once_in_order_and_respect_their_size(numels: list[int], limit: int) -> None:
    parameters: Shapes = {f"p{i}": ((numel,), torch.float32) for i, numel in enumerate(numels)}
    buckets = plan_buckets(parameters, limit)
    assert [name for bucket in buckets for name in bucket] == list(parameters)
    bytes_of = {name: aligned_bytes(shape[0], torch.float32) for name, (shape, _) in parameters.items()}
    room = max(limit, *bytes_of.values())
    sizes = [sum(bytes_of[name] for name in bucket) for bucket in buckets]
    assert max(sizes) <= room
    assert all(size + bytes_of[after[0]] > room for size, after in zip(sizes, buckets[1:], strict=False))
