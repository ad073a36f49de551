"""YAML as pocketgrpo reads and writes it: the scalars of YAML 1.2, no duplicate keys, no aliases.

PyYAML alone reads YAML 1.1, where `1e-3` is a string, `off` is false and `1:30` is ninety.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from re import compile as regex
from typing import Any

import yaml

from configs.errors import UsageError

# The core schema of YAML 1.2 (section 10.3.2) less octal and hexadecimal: tag, pattern, first characters.
_SCALARS = (
    ("null", regex(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", regex(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", regex(r"^[-+]?[0-9]{1,40}$"), list("-+0123456789")),
    (
        "float",
        regex(
            r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
            r"|\.inf|\.Inf|\.INF|\.nan|\.NaN|\.NAN)$"
        ),
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            text = "an alias (*name) is not supported; write the value out, or quote it if it is text"
            raise yaml.composer.ComposerError(None, None, text, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or mapping as a key: PyYAML's own error below
            if key.value in lines:
                text = f"{key.value} is given twice, first in line {lines[key.value]}; keep one of the two"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    """PyYAML's own reads `010` as eight."""
    return int(node.value)


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """PyYAML folds Unicode's line breaks to a space unless they stand escaped between double quotes."""
    style = '"' if set(value) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


def _list(dumper: _Dumper, value: list[object]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)


def read_yaml(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """Returns the value of `text` and the line of every dotted key in it.

    Raises UsageError, naming `source` and the place, for text that is no YAML of this kind.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"{source}{place}: not readable as YAML ({reason}). Correct that place.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a tag such as `!!int` on other text
        raise UsageError(f"{source}: not readable as YAML ({' '.join(str(error).split())}). Correct it.") from None
    except RecursionError:
        raise UsageError(
            f"{source}: brackets or indentation go too deep to be a config, which is two or three levels deep. "
            "Correct it."
        ) from None
    return value, dict(_lines(node))


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")


def write_yaml(value: object) -> str:
    """Returns `value` (mappings, lists, scalars) as YAML that `read_yaml` reads back unchanged.

    It may be printed: with a character in it that hides or moves others, all but ASCII stands escaped.
    """
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=100)
