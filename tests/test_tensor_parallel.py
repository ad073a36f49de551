"""A rollout worker whose model is shared by two processes: in sync with the learner, and gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from transformers import LlamaConfig

from cluster.engine_fit import check_tensor_parallel
from configs.errors import UsageError
from configs.schema import Config
from tests.conftest import SHARED_MEMORY
from tests.processes import title
from tests.test_weight_sync import (
    BUCKET_BYTES,
    PROMPT,
    SAMPLED,
    TEMPERED,
    Rig,
    difference,
    healthy,
    make_model,
    stops_the_run,
)

END_SECONDS = 60.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """With tied embeddings, as small models have them: the head is then a shard that is packed apart."""
    folder, before = tmp_path_factory.mktemp("models"), _shared_memory()
    old, new = (make_model(folder / str(seed), tied=True, seed=seed) for seed in range(2))
    rig = Rig(old, new, BUCKET_BYTES, tensor_parallel=2)
    processes = [process for process in psutil.Process().children() if title(process).startswith("VLLM")]
    assert len(processes) == 2, "the model is shared by two processes, or this test proves nothing"
    yield rig
    rig.engine.close()
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    assert not alive
    assert _shared_memory() <= before


def _shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()}


def test_log_probs_are_the_learners_before_and_after_a_sync(rig: Rig) -> None:
    old = rig.load(rig.old)
    before = rig.sample(PROMPT, SAMPLED)
    assert healthy(difference(old, PROMPT, before, TEMPERED))
    assert stops_the_run(difference(rig.policy, PROMPT, before, TEMPERED))
    for policy, other in ((rig.policy, old), (old, rig.policy)):
        seconds = rig.sync(policy)
        after = rig.sample(PROMPT, SAMPLED)
        assert healthy(difference(policy, PROMPT, after, TEMPERED))
        assert stops_the_run(difference(other, PROMPT, after, TEMPERED))
        assert {int(version) for completion in after for version in completion.versions} == {rig.engine.version}
        assert set(seconds) == {"gather", "copy", "load", "repack"}


def test_a_shard_that_is_not_the_new_one_stops_the_run(rig: Rig) -> None:
    """The planted fault: the second half of rows, which is one process's shard, is from the old weights."""
    old = dict(rig.load(rig.old).named_weights())

    def half_old(name: str, tensor):
        rows = tensor.shape[0] // 2
        mixed = tensor.detach().clone()
        mixed[rows:] = old[name][rows:]
        return mixed

    rig.sync(rig.policy, lambda tensors: [(n, half_old(n, t) if "mlp.up_proj" in n else t) for n, t in tensors])
    assert stops_the_run(difference(rig.policy, PROMPT, rig.sample(PROMPT, SAMPLED), TEMPERED))


def test_a_missing_tensor_is_an_error(rig: Rig) -> None:
    """Last of those that use the rig: vLLM takes no further update after one that failed."""
    missing = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=r"lacked 1 parameters.*layers\.1\.mlp\.up_proj"):
        rig.sync(rig.policy, lambda tensors: [(n, t) for n, t in tensors if n != missing])


@pytest.mark.parametrize(
    ("asked", "heads", "kv_heads", "width", "vocabulary", "what", "fits"),
    [
        (2, 5, 5, 448, 107, "5 attention heads and 5 KV heads", 1),
        (6, 12, 2, 1536, 32000, "vocabulary of 32000", 4),
        (4, 12, 3, 1536, 49152, "3 KV heads", 3),
        (4, 8, 2, 1538, 32000, "inner width of 1538", 2),
        (3, 9, 3, 1536, 49152, None, 3),
        (4, 8, 2, 1536, 32000, None, 4),
    ],
)
def test_a_model_that_cannot_be_shared_is_refused_with_what_fits(
    asked: int, heads: int, kv_heads: int, width: int, vocabulary: int, what: str | None, fits: int
) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 64 * heads}
    model = LlamaConfig(**sizes, intermediate_size=width, vocab_size=vocabulary, num_hidden_layers=2)

    def check(count: int) -> None:
        check_tensor_parallel(Config.model_validate({"rollout": {"tensor_parallel": count}}), model)

    if what:
        with pytest.raises(UsageError, match=rf"rollout\.tensor_parallel={asked} .*{what}.* fits is {fits}\."):
            check(asked)
    check(fits)
