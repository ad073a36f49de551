"""The schema as a flat list of options: dotted key, type in words, default, description."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from configs.schema import Config, Section


@dataclass(frozen=True)
class Option:
    """One value the user can set.

    expected: which values it takes, in words. entry: what an entry takes, where it is a mapping.
    """

    key: str
    expected: str
    default: object
    description: str
    is_text: bool
    takes_null: bool
    entry: str = ""

    @property
    def is_mapping(self) -> bool:
        return bool(self.entry)


def _walk(section: type[Section], prefix: str = "") -> Iterator[Option | tuple[str, str]]:
    """Yields every option below `section`, and (key, title) of every section before what is in it."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield prefix + name, annotation.__doc__ or ""
            yield from _walk(annotation, f"{prefix}{name}.")
        else:
            yield _option(prefix + name, field)


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def _in_words(annotation: Any, metadata: list[Any]) -> str:
    """Describes a type and its limits: `an integer at least 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0], [limit for extra in annotation.__metadata__ for limit in extra.metadata])
    if origin is Literal:
        values = [str(value) for value in arguments]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin in (Union, types.UnionType):
        words = ", or ".join(_in_words(argument, []) for argument in arguments)
    elif origin is tuple:
        words = f"a list of {len(arguments)} items, each {_in_words(arguments[0], [])}"
    elif origin is dict:
        entry = _entry(arguments[1])
        words = (
            f"a mapping from names to {'numbers' if 'number' in entry else entry if 'one of' in entry else 'values'}"
        )
    elif origin is list:
        words = f"a list, each {_in_words(arguments[0], [])}"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        words = f"a mapping with {' and '.join(annotation.model_fields)}"
    else:
        words = _NAMES[annotation]
    limits = [text for text in map(_limit_in_words, metadata) if text]
    return f"{words} {' and '.join(limits)}" if limits else words


def _entry(annotation: Any) -> str:
    """Describes what an entry of a mapping takes: `a number above 0`."""
    takes_list = any(get_origin(member) is list for member in get_args(annotation))
    return "a value or a list of values" if takes_list else _in_words(annotation, [])


def _limit_in_words(limit: Any) -> str | None:
    match limit:
        case annotated_types.Ge(ge=bound):
            return f"at least {bound}"
        case annotated_types.Gt(gt=bound):
            return f"above {bound}"
        case annotated_types.Le(le=bound):
            return f"at most {bound}"
        case annotated_types.Lt(lt=bound):
            return f"below {bound}"
        case annotated_types.MultipleOf(multiple_of=unit):
            return f"a multiple of {unit}"
        case annotated_types.MinLen(min_length=1):
            return "that is not empty"
        case annotated_types.MaxLen(max_length=bound):
            return f"of at most {bound} characters"
    pattern = getattr(limit, "pattern", None)
    return None if pattern is None else f"matching {pattern}"


def _option(key: str, field: FieldInfo) -> Option:
    origin, members = get_origin(field.annotation), get_args(field.annotation)
    return Option(
        key=key,
        expected=_in_words(field.annotation, field.metadata),
        default=field.get_default(call_default_factory=True),
        description=field.description or "",
        is_text=field.annotation is str or (origin in (Union, types.UnionType) and str in members),
        takes_null=types.NoneType in members,
        entry=_entry(members[1]) if origin is dict else "",
    )


OPTIONS: dict[str, Option] = {found.key: found for found in _walk(Config) if isinstance(found, Option)}
SECTIONS: dict[str, str] = dict(found for found in _walk(Config) if isinstance(found, tuple))


def find_option(key: str) -> Option | None:
    """Returns the option that `key` sets, whole or (`rewards.weights.format`) one entry of it."""
    parent = OPTIONS.get(key.rpartition(".")[0])
    return OPTIONS.get(key) or (parent if parent is not None and parent.is_mapping else None)


def nearest_keys(key: str, count: int = 3) -> list[str]:
    """Returns the valid keys that `key` may have meant, best first: misspelt, or in another section.

    What a key is called counts as much as how it is spelt in full; none is returned for a name that
    resembles no other.
    """
    name = key.rpartition(".")[2]
    scores: dict[str, float] = {}
    for candidate in OPTIONS:
        same_name = _likeness(name, candidate.rpartition(".")[2])
        if same_name >= 0.7:
            scores[candidate] = same_name + _likeness(key, candidate)
    best = max(scores.values(), default=0.0)
    near = [candidate for candidate, score in scores.items() if score > best - 0.4]
    return sorted(near, key=lambda candidate: -scores[candidate])[:count]


def _likeness(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()
