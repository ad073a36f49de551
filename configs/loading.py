"""Config files and `section.key=value` overrides, made into a `Config` or one clear UsageError."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import UsageError
from configs.mistakes import (
    COMMAND_LINE,
    Setting,
    did_you_mean,
    idle_mistake,
    key_mistake,
    paragraph,
    shown,
    value_mistakes,
)
from configs.options import OPTIONS, SECTIONS, find_option
from configs.schema import Config
from configs.yaml_text import read_yaml, write_yaml

RECIPES = Path(__file__).parent


def recipe_names() -> list[str]:
    """Returns the names of the recipes shipped in configs/."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_config(path: Path | str) -> Path:
    """Returns the config file that `path` means: a file, or a shipped recipe by its bare name.

    Raises UsageError, listing the recipes, where there is neither.
    """
    path = Path(path)
    if isfile(path):
        return path
    name = path.name.removesuffix(".yaml")  # not the stem: a recipe's name may hold a dot
    if path.parent == Path() and name in recipe_names():
        recipe = RECIPES / f"{name}.yaml"
        return recipe.relative_to(Path.cwd()) if recipe.is_relative_to(Path.cwd()) else recipe
    found = "is a folder" if isdir(path) else "does not exist"
    raise UsageError(
        f"The config {path} {found}. Give a YAML file, or the name of a shipped recipe: {', '.join(recipe_names())}."
    )


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Returns the schema's defaults, changed by the file at `path` if any, then by the overrides.

    A bare recipe name (`quickstart`) stands for the shipped file; a later override wins over an
    earlier one. Raises UsageError, one paragraph that lists every mistake with its source and fix.
    """
    file = None if path is None else find_config(path)
    given = [parse_override(text) for text in overrides]
    settings = [*(read_settings(file) if file else []), *given]
    mistakes = [text for text in map(key_mistake, settings) if text]
    known = [setting for setting in settings if find_option(setting.key)]
    try:
        config = Config.model_validate(_as_tree(known))
    except ValidationError as error:
        sources = [*([str(file)] if file else []), *([COMMAND_LINE] if given else [])]
        mistakes += value_mistakes(error, known, " and ".join(sources))
    else:
        mistakes += [text for setting in given if (text := idle_mistake(setting, config))]
    if mistakes:
        raise UsageError(paragraph(mistakes))
    return config


def dump_config(config: Config) -> str:
    """Returns the whole config as YAML text; loading it gives an equal config."""
    return write_yaml(config.model_dump(mode="json"))


def parse_override(text: str) -> Setting:
    """Reads `section.key=value`. Text options take the value as it stands, others read it as YAML.

    Raises UsageError if there is no `=`, or the value is no YAML. Does not ask whether the key exists.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        hint = f"Write {key}=VALUE" if find_option(key) else did_you_mean(key)
        raise UsageError(f"{COMMAND_LINE}: expected section.key=value, but got {text}. {hint}.")
    option = find_option(key)
    if option is not None and option.is_text:
        return Setting(key, None if option.takes_null and value == "null" else value, COMMAND_LINE)
    return Setting(key, read_yaml(value, f"{COMMAND_LINE}, {text}")[0], COMMAND_LINE)


def read_settings(file: Path) -> list[Setting]:
    """Reads a config file into one setting per option, in the file's order.

    Raises UsageError if the file cannot be read, is no YAML, or is no mapping of sections.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The config {file} cannot be read ({error}). Give a YAML file in UTF-8.") from None
    tree, lines = read_yaml(text, str(file))
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise UsageError(f"{file}: expected sections, such as training:, with options in them, but got {shown(tree)}.")
    return [
        Setting(key, value, f"{file}, line {lines[key]}" if key in lines else str(file)) for key, value in _flat(tree)
    ]


def _flat(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in OPTIONS:
            yield from _flat(value, f"{key}.")
        elif key not in SECTIONS or value:  # a section whose options are all commented out is empty
            yield key, value


def _as_tree(settings: Sequence[Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for setting in settings:
        *path, name = setting.key.split(".")
        node = tree
        for depth, part in enumerate(path, 1):
            option = OPTIONS.get(".".join(path[:depth]))
            start = option.default if option else None  # an entry joins the default entries
            node = node.setdefault(part, dict(start) if isinstance(start, dict) else {})
        if isinstance(node, dict):  # else a wrong value stands there, and is found as such
            node[name] = setting.value
    return tree
