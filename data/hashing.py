"""Hashes that stay the same on every machine, Python and library version."""

from __future__ import annotations

import hashlib


def stable_hash(*parts: int | str) -> int:
    """A 64-bit hash of the parts, in order. 1 and "1" differ, and so do ("ab",) and ("a", "b")."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def question_id(question: str) -> str:
    """The id of a problem: a 128-bit hash of its question, blind to how the whitespace falls."""
    text = " ".join(question.split())
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
