"""The two ways a run ends badly on purpose. Each message is one paragraph: cause, then fix."""

from __future__ import annotations

FAILURE, USAGE = 1, 2  # exit codes


class _Message(Exception):
    """Quotes what people, files and models wrote, so nothing in it may be a command to a terminal."""

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


class UsageError(_Message):
    """The user's own mistake (config, model, data, resources). Exit code 2, no traceback."""


class RunError(_Message):
    """A run that had to stop (log-prob mismatch, deadline missed, disk full). Exit code 1."""
