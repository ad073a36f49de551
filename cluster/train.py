"""A run from its command line: what `ray job submit` runs as `python -m cluster.train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from actors.imports import importing
from cluster.interrupts import exit_code, stop_when_told
from cluster.terminal import escape_crashes, say_error
from configs.command_line import Arguments, parse_arguments
from configs.errors import FAILURE, USAGE, RunError, UsageError
from configs.loading import dump_config
from configs.urls import is_url


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m cluster.train", default_recipe: str = "quickstart"
) -> int:
    """Parse, train, and return the exit code: 0, 1 failure, 2 usage, 130 / 143 interrupted."""
    try:
        arguments = parse_arguments(argv, prog, default_recipe)
        if arguments.print_config:
            print(dump_config(arguments.config), end="")  # has no unsafe character in it
            return 0
        if arguments.plan:
            return plan(arguments)
        return train(arguments)
    except UsageError as error:
        say_error(error)
        return USAGE
    except RunError as error:
        say_error(error)
        return FAILURE
    except KeyboardInterrupt:
        print("interrupted before anything was started or changed", file=sys.stderr)
        return exit_code()


def plan(arguments: Arguments) -> int:
    """Print the plan for what is here: 0, or 1 if the run does not fit."""
    from cluster.hardware import hardware_here
    from cluster.plan_report import print_plan

    return print_plan(arguments.config, arguments.config_name, hardware_here(), None)


def train(arguments: Arguments) -> int:
    """One run, new or resumed, on the Ray cluster there is or a local one. Returns the exit code."""
    # Imported here, so that --help and a typo in the config answer at once.
    with importing():
        from cluster.preflight import check_before_ray
        from cluster.progress import Display
        from cluster.resume import find_resumed
        from cluster.session import run_session

    display = Display(arguments.config.telemetry.live)
    if arguments.resume_auto:
        display.say(f"--resume auto: going on with {arguments.resume}, the newest run that can be gone on with")
    check_before_ray(arguments.config, display.say if arguments.dry_run else lambda _: None)  # a run says it later
    run = arguments.resume
    fetched = run is not None and is_url(run) and arguments.dry_run  # too much for a dry run
    resumed = None if run is None or fetched else find_resumed(run, arguments.config, display.say)
    if arguments.dry_run:
        display.say("The config is valid. Nothing was started, as --dry-run asks.")
        return 0
    return run_session(arguments.config, arguments.config_name, resumed, display)


if __name__ == "__main__":
    escape_crashes()
    stop_when_told()
    sys.exit(main())
