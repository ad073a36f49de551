"""How a process ends that hosted a learner rank. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process; at once, as Ray ends an actor's, if DeepSpeed was imported here, as by a learner rank.

    DeepSpeed keeps the process group, and so gloo its threads. One that is late to let a tensor go asks for the
    interpreter's lock, and if that has been torn down meanwhile, the process aborts (pytorch/pytorch#179291).
    """
    if "deepspeed" not in sys.modules:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
