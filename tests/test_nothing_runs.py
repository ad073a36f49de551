"""Claims about code: none comes from a config but by module:function, and nothing that comes from outside is run."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from actors.engine import Engine, EngineOptions, Sampling
from cluster.mirror import fetch_run
from cluster.train import main
from cluster.weight_transport import SHARED_MEMORY, WORKER_EXTENSION
from configs.errors import RunError, UsageError
from configs.loading import load_config
from configs.schema import Model
from data.errors import DatasetError
from data.loading import Source, load_source
from data.prompts import Template, render
from learner import trainer_state
from learner.model_cache import ModelError
from learner.policy import load_policy
from learner.pretrained import resolve_model
from rewards import check_weights
from tests.small_run import ROOT
from tests.tiny import tiny_llama

PACKAGES = ("actors", "benchmarks", "cluster", "configs", "data", "evaluation", "learner", "rewards")

# -- our own sources ---------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "joblib", "shelve", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {
    ("torch", "load"), ("os", "system"), ("os", "popen"), ("pandas", "read_pickle"),
    ("yaml", "load"), ("yaml", "load_all"), ("yaml", "full_load"), ("yaml", "unsafe_load"),
    ("importlib", "import_module"), ("util", "spec_from_file_location"),
}  # fmt: skip
# file -> what it may do, and why
REASONS = {
    "rewards/unit_tests.py": {"exec", "compile"},  # the model's program, in the sandbox
    "rewards/code.py": {"compile"},  # of the gold tests' syntax; the result is thrown away
    "rewards/own.py": {"importlib.import_module"},  # the one way a config names code
    "data/gym.py": {"importlib.import_module"},  # the installed reasoning_gym
    "benchmarks/harness.py": {"shell=True"},  # times the command that its own command line gives
    "benchmarks/learner_speed.py": {"from_pretrained"},  # of a model that it has just made
}  # fmt: skip


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a source that runs or unpickles what it is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield node.lineno, str(node.module)
            yield from ((node.lineno, a.name) for a in node.names if (node.module, a.name) in METHODS)
        elif isinstance(node, ast.Name) and node.id in CALLS:  # also under another name
            yield node.lineno, node.id
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _of_call(node))


def _of_call(node: ast.Call) -> Iterator[str]:
    function, keywords = node.func, {k.arg: k.value for k in node.keywords}
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else getattr(function.value, "attr", "")
        if (owner, function.attr) in METHODS:
            yield f"{owner}.{function.attr}"
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    if name == "from_pretrained" and not _is(keywords.get("trust_remote_code"), False):
        yield name
    for keyword, safe in (
        ("shell", False),
        ("allow_pickle", False),
        ("trust_remote_code", False),
        ("weights_only", True),
    ):
        if keyword in keywords and not _is(keywords[keyword], safe):
            yield f"{keyword}={ast.unparse(keywords[keyword])}"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_our_sources_neither_unpickle_nor_run_what_they_are_given() -> None:
    files = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
    assert len(files) > 100
    found: dict[str, set[str]] = {}
    for path in files:
        for _, what in dangers(ast.parse(path.read_text())):
            found.setdefault(str(path.relative_to(ROOT)), set()).add(what)
    assert found == REASONS


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval(text)",
        "exec(compile(text, 'x', 'exec'))",
        "import yaml\nyaml.load(text)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=trust)",
        "EngineArgs(trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
        "np.load(x, allow_pickle=True)",
        "os.system(x)",
        "def late():\n    import marshal",
        "importlib.util.spec_from_file_location('a', path)",
    ],
)
def test_the_check_sees_each_of_them(source: str) -> None:
    assert list(dangers(ast.parse(source)))


# -- configs -----------------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """What every planted piece of code would create."""
    return tmp_path / "owned"


def code(trap: Path) -> str:
    return f"open({str(trap)!r}, 'w').close()\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os:system", "is no reward"),
        ("builtins:eval", "is no reward"),
        ("builtins:exec", "is no reward"),
        ("subprocess:Popen", "is no reward"),
        ("pickle:loads", "is no reward"),
        ("os:path", "names no function"),
        ("TRAP.py:f", "is no module:function"),
        ("../evil:f", "is no module:function"),
        ("evil/inner:f", "is no module:function"),
        ("http://evil.test/a.py:f", "is no module:function"),
        ("lambda case, judgement: 1.0", "is no module:function"),
        ("os:system('touch x')", "is no module:function"),
        ("evil:f.__globals__", "is no module:function"),
        ("evil:f:g", "is no module:function"),
        ("evil:", "is no module:function"),
        (":f", "is no module:function"),
        ("evil:f\n", "is no module:function"),
        ("__import__('os').system('x')", "no reward named"),
        ("evil.py", "no reward named"),
        ("evil", "no reward named"),
    ],
)
def test_a_reward_is_a_module_and_a_function_of_two_arguments_or_refused(
    name: str, said: str, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner.py").write_text(code(trap))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "inner.py").write_text(code(trap))
    with pytest.raises(ValueError, match=said):
        check_weights({name.replace("TRAP", str(tmp_path / "inner")): 1.0})
    assert not trap.exists()


TAGS = (
    "!!python/object/apply:os.system ['touch TRAP']",
    "!!python/object/new:os.system ['touch TRAP']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:os.system {}",
    "!!binary aGVsbG8=",
    "!include /etc/passwd",
    "&a [*a]",
    "[" * 5000,
    "{a: " * 5000,
)


@pytest.mark.parametrize("text", TAGS, ids=[tag[:25] for tag in TAGS])
def test_yaml_makes_no_objects(text: str, trap: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    text = text.replace("TRAP", str(trap))
    file.write_text("training: {name: " + text + "}\n")
    with pytest.raises(UsageError):
        load_config(file)
    with pytest.raises(UsageError):
        load_config(None, [f"training.steps={text}"])
    assert not trap.exists()


# -- model folders and checkpoints ---------------------------------------------------------------------


class Bomb:
    """A pickle of it creates the trap where it is read."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trap), "w")


def plant(folder: Path, trap: Path) -> None:
    """Pickles under all the names that libraries look for, and code that configs point at."""
    names = ("pytorch_model.bin", "model.bin", "model.pt", "consolidated.00.pth", "rank_0.pt", "training_args.bin")
    for name in (*names, "adapter_model.bin", "tokenizer.pkl", "optimizer.pt", "vocab.pkl", "a.ckpt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trap)))
    torch.save(Bomb(trap), folder / "scheduler.pt")
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "dataset.py"):
        (folder / name).write_text(code(trap))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(trap))
    classes = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    change(folder / "config.json", auto_map=classes)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": classes["AutoTokenizer"]})


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def planted(clean: Path, trap: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "planted"
    shutil.copytree(clean, folder)
    plant(folder, trap)
    return folder


def test_the_planted_pickle_would_go_off(planted: Path, trap: Path) -> None:
    pickle.loads((planted / "pytorch_model.bin").read_bytes())
    assert trap.exists(), "else the tests below prove nothing"


def test_a_model_folder_full_of_pickles_and_code_is_loaded_without_them(
    planted: Path, clean: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who is asked says yes
    assert resolve_model(Model(name=str(planted))) == planted
    policy, same = (load_policy(folder, "float32", 64, False) for folder in (planted, clean))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), same.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(planted, trust_remote_code=False)
    engine = Engine(EngineOptions(planted, "float32", 96, 8, 32, 16 << 20, SHARED_MEMORY, WORKER_EXTENSION))
    try:
        engine.add("a", 0, [1, 8, 9, 10], 0, Sampling(0.0, 4))
        while engine.busy:
            engine.step()
    finally:
        engine.close()
    assert len(tokenizer) > 0 and not trap.exists()


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_beside_a_decoy(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def index_of_pickles(folder: Path) -> None:
    pickle_beside_a_decoy(folder)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leads_out(folder: Path) -> None:
    index_of_pickles(folder)
    change(folder / "model.safetensors.index.json", weight_map={"a": "../elsewhere/model.safetensors"})


def adapters_of_another_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))


def unknown_type(folder: Path) -> None:
    change(folder / "config.json", model_type="evil")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (only_pickle, "no .safetensors file"),
        (index_of_pickles, "names 'pytorch_model.bin'"),
        (index_that_leads_out, "in the same folder alone"),
        (adapters_of_another_model, "holds adapters"),
        (unknown_type, "code of the model's own is never run"),
    ],
)
def test_a_folder_that_leads_elsewhere_is_refused(planted: Path, trap: Path, spoil: Any, said: str) -> None:
    spoil(planted)
    with pytest.raises(ModelError, match=said):
        resolve_model(Model(name=str(planted)))
    assert not trap.exists()


@pytest.mark.parametrize("spoil", [only_pickle, pickle_beside_a_decoy])
def test_the_learner_itself_takes_safetensors_or_nothing(planted: Path, trap: Path, spoil: Any) -> None:
    spoil(planted)
    with pytest.raises(OSError, match="safetensors"):
        load_policy(planted, "float32", 64, False)
    assert not trap.exists()


def test_a_trainer_state_that_is_a_pickle_is_not_read_as_one(tmp_path: Path, trap: Path) -> None:
    facts = {"version": 0, "scalars": {}, "partitions": []}
    trainer_state.write(tmp_path, 0, {"master.0": torch.ones(2)}, facts)
    assert trainer_state.SavedRank(tmp_path, 0).master(0).tolist() == [1, 1]
    (tmp_path / "rank_0.safetensors").write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(SafetensorError, match="header"):
        trainer_state.SavedRank(tmp_path, 0)
    assert not trap.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set x = cycler.__init__.__globals__.os.system('touch TRAP') %}",
        "{{ lipsum.__globals__['os'].popen('touch TRAP').read() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_reaches_nothing_of_python(clean: Path, trap: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(clean, trust_remote_code=False)
    text = template.replace("TRAP", str(trap))
    with pytest.raises(DatasetError, match="cannot render"):
        render(tokenizer, "1 + 1", Template(None, "{question}", (), text, "think"))
    assert not trap.exists()


# -- datasets and runs from elsewhere ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.py", "rows.arrow", "rows.zip"]
)
def test_a_dataset_file_of_another_kind_is_refused_unread(name: str, tmp_path: Path, trap: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(DatasetError, match=r"must end in \.jsonl, \.json, \.parquet"):
        load_source(Source(str(tmp_path / name)))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_pickle_under_a_datasets_name_is_no_table(name: str, tmp_path: Path, trap: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(DatasetError, match=r"cannot be read|no text in UTF-8"):
        load_source(Source(str(tmp_path / name)))
    assert not trap.exists()


@pytest.mark.parametrize("data", [True, False], ids=["beside rows", "alone"])
def test_a_dataset_folders_script_is_never_run(tmp_path: Path, trap: Path, data: bool) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    for name in ("evil.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(code(trap))
    (folder / "train.pkl").write_bytes(pickle.dumps(Bomb(trap)))
    if data:
        (folder / "train.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    with pytest.raises(DatasetError, match=r"scripts are no longer supported" if data else "could not be loaded"):
        load_source(Source(str(folder)))
    assert not trap.exists()


def test_a_run_at_a_url_writes_nothing_outside_its_folder(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for name in ("config.yaml", "../escaped", "checkpoints/step_000001/../../../../escaped"):
        files.store[f"/evil-run/{name}"] = files.open("/scratch", "wb")
    files.pipe("/evil-run/config.yaml", b"training: {steps: 1}\n")
    with pytest.raises(RunError, match="outside of the run's folder"):
        fetch_run("memory://evil-run", tmp_path / "a" / "run", 20)
    assert not list(tmp_path.rglob("escaped"))


def test_a_config_names_no_code_anywhere_else(capsys: pytest.CaptureFixture[str], trap: Path) -> None:
    """Texts that other programs would expand or evaluate are texts here."""
    for value in (f"$(touch {trap})", f"`touch {trap}`", f"__import__('os').system('touch {trap}')", f"; touch {trap}"):
        main(["--dry-run", f"data.system_prompt={value}", f"model.name={value}"])
        capsys.readouterr()
    assert not trap.exists()
