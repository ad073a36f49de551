"""The error of bad data: one paragraph that names the cause and the fix."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset that cannot be used as it is: missing, unreadable, too small, or with a bad row."""
