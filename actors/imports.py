"""Loading many modules at once, in three quarters of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Within, nobody looks for garbage: what vLLM or transformers make when they are imported stays, and looking it
    through again and again is a quarter of the time. It is left out of every later search as well."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
