"""pocketgrpo: teach a small language model to reason, on one machine.

`load_config` and `train` are the facade; `main` is the console command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from configs.errors import RunError, UsageError
from configs.loading import load_config
from configs.schema import Config

__all__ = ["Config", "RunError", "UsageError", "load_config", "main", "train"]

USAGE = """usage: pocketgrpo COMMAND ...

commands:
  train     train a model; `pocketgrpo train --help` explains every option
  evaluate  score a model on benchmarks; `pocketgrpo evaluate --help`
  plan      the memory and time that a run takes on a hardware; `pocketgrpo plan --help`
  replay    recompute an update of a run from disk; `pocketgrpo replay --help`
"""


def train(config: Config, name: str = "run") -> int:
    """Train with this config; returns the exit code. UsageError and RunError propagate."""
    from cluster.progress import Display
    from cluster.session import run_session

    return run_session(config, name, None, Display(config.telemetry.live))


def main(argv: Sequence[str] | None = None) -> int:
    """The console command: hands on to the command named first. `replay` ends the process itself."""
    from cluster.interrupts import stop_when_told
    from cluster.terminal import escape_crashes

    escape_crashes()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("train", "evaluate"):
        stop_when_told()
    if command == "train":
        from cluster.train import main as train_main

        return train_main(rest, "pocketgrpo train")
    if command == "evaluate":
        from cluster.evaluate import main as evaluate_main

        return evaluate_main(rest, "pocketgrpo evaluate")
    if command == "plan":
        from cluster.plan_report import main as plan_main

        return plan_main(rest)
    if command == "replay":
        from cluster.replay import main as replay_main
        from learner.ending import end_process

        end_process(replay_main(rest))
    asked = command in ("-h", "--help", "help")
    if command and not asked:
        print(f"error: there is no command {command!r}\n", file=sys.stderr)
    print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
