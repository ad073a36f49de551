"""The two ways a run ends badly on purpose. Each message is one paragraph: cause, then fix."""

from __future__ import annotations

FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # exit codes


class UsageError(Exception):
    """The user's own mistake (config, model, data, resources). Exit code 2, no traceback."""


class RunError(Exception):
    """A run that had to stop (log-prob mismatch, deadline missed, disk full). Exit code 1."""
