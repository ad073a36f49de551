"""Ctrl-C and SIGTERM: the first asks the loop to stop after the step under way, the second leaves at once.

Where no loop runs, either is a KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import NoReturn

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_told = EXIT_CODES[signal.SIGINT]  # of the last signal; Python raises a Ctrl-C by itself where nobody asked us to


def stop_when_told() -> None:
    """Raise KeyboardInterrupt at Ctrl-C and SIGTERM from now on; for a command, before it does anything."""
    for number in EXIT_CODES:
        signal.signal(number, lambda number, _: _stop(EXIT_CODES[signal.Signals(number)]))


def exit_code() -> int:
    """Of the KeyboardInterrupt that was caught: 130 or 143. Ray raises one of its own in the place of what a handler
    raises, so it cannot be told by its type."""
    return _told


def _stop(code: int) -> NoReturn:
    global _told
    _told = code
    raise KeyboardInterrupt


class Interrupts:
    """While entered, `exit_code` is None, or what the process shall exit with because it was told to stop."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def obey(self) -> None:
        """KeyboardInterrupt if there was a signal: where the loop cannot go on to the end of its step."""
        if self.exit_code is not None:
            _stop(self.exit_code)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        code = EXIT_CODES[signal.Signals(number)]
        if self.exit_code is not None:
            os._exit(code)  # Ray's own processes end with their driver
        self.exit_code = code
