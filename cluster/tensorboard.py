"""Metrics as TensorBoard events, without importing torch or tensorflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from cluster.run_folder import written


class TensorBoard:
    """Writes one scalar per metric and step. `rewound_to`: points after that step are taken back."""

    def __init__(self, folder: Path, rewound_to: int | None = None) -> None:
        self._folder = folder
        self._writer = EventFileWriter(str(folder))
        if rewound_to is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=rewound_to + 1, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        with written(self._folder):
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        with written(self._folder):
            self._writer.close()
