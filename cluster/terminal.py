"""What the commands print besides a run's lines. Any of it may hold text from outside, so all of it is escaped."""

from __future__ import annotations

import argparse
import sys
import traceback
from types import TracebackType
from typing import NoReturn

from configs.errors import UsageError
from data.escaping import escaped


def say(text: str) -> None:
    """Print the text; its line breaks stay."""
    print(escaped(text, keep="\n"))


def say_error(error: object) -> None:
    """Print `error: …` on standard error, on one line, so that no message can pass for two."""
    print(escaped(f"error: {' '.join(str(error).split())}"), file=sys.stderr)


def escape_crashes() -> None:
    """Let the traceback of what nobody foresaw, whose message may quote anything, be escaped as well."""
    sys.excepthook = _show_crash


def _show_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(escaped(text, keep="\n"), end="", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes as UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"command line: {message}. {self.prog} --help explains every option.")
