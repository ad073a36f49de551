"""A user's own reward, named in the config as `module:function`."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

_NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


def find_own(name: str) -> Callable[..., Any]:
    """The function behind `package.module:function`; ValueError, saying what to do, if there is none.

    The module is looked for on the Python path and in the folder the command was started from; Ray's
    workers look there too. It is trusted code: importing it runs it. Nothing else in a config names code.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"rewards.weights: {name!r} is no module:function and no registered reward; a reward of your own is named "
            "by its module as Python imports it, such as own_reward:brief, not by a path or an expression"
        )
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it shadows nothing
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ValueError(
            f"rewards.weights: {name} names the module {module_name!r}, which cannot be imported "
            f"({type(error).__name__}: {error}); start from the folder that holds it, or add that to PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = ", ".join(sorted(key for key, value in vars(module).items() if callable(value))) or "none"
        raise ValueError(
            f"rewards.weights: {name} names no function of {getattr(module, '__file__', module_name)}: expected "
            f"def {function_name}(case, judgement), and the module's functions are: {found}"
        )
    if not _takes_case_and_judgement(function):
        raise ValueError(
            f"rewards.weights: {name} is no reward: expected a Python function that takes a case and a judgement, "
            f"def {function_name}(case, judgement)"
        )
    return function


def _takes_case_and_judgement(function: Callable[..., Any]) -> bool:
    if inspect.isbuiltin(function) or inspect.isclass(function):
        return False
    try:
        inspect.signature(function).bind("case", "judgement")
    except (TypeError, ValueError):  # other arguments; no signature
        return False
    return True
