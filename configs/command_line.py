"""The command line of a run: its options, its --help made from the schema, its overrides."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from configs.errors import UsageError
from configs.loading import find_config, load_config, parse_override, recipe_names
from configs.mistakes import COMMAND_LINE, shown
from configs.newest_run import AUTO, newest_run
from configs.options import OPTIONS, SECTIONS, find_option
from configs.schema import Config, Training
from configs.urls import fetch_config, is_url

# A resumed run computes what it would have computed; these only say how long, what is watched, and who computes.
RESUME_MAY_CHANGE = (
    "training.steps",
    "evaluation.",
    "checkpoint.",
    "telemetry.",
    "cluster.dashboard_port",
    "cluster.learner_ranks",
    "learner.zero_stage",
)
RUNS_DIR = "training.runs_dir"


@dataclass(frozen=True)
class Arguments:
    """What a command line asks for. `config_name` names the recipe, or on --resume the run.

    resume: a run's folder or URL; resume_auto: whether it was found and not given.
    """

    config: Config
    config_name: str
    print_config: bool
    dry_run: bool
    plan: bool
    resume: str | None
    resume_auto: bool = False


def parse_arguments(argv: Sequence[str] | None, prog: str, default_config: Path | str) -> Arguments:
    """Reads `argv` (None: the process's own) into a checked config and the flags.

    Raises UsageError for every mistake in them. `--help` prints and raises SystemExit(0).
    """
    parser = _parser(prog, default_config)
    given = parser.parse_intermixed_args(argv)
    if given.resume is not None and given.config is not None:
        raise UsageError(
            f"{COMMAND_LINE}: --config {given.config} and --resume {given.resume} contradict each other: "
            f"a resumed run keeps its own config. Leave one of them away."
        )
    resume, overrides = given.resume, given.overrides
    if resume == AUTO:
        resume, overrides = _find_run(overrides)
    if resume is not None:
        config, name = _resumed_config(resume, overrides), Path(resume).resolve().name
    else:
        file = find_config(given.config or default_config)
        config, name = load_config(file, given.overrides), file.stem
    return Arguments(
        config=config,
        config_name=name,
        print_config=given.print_config,
        dry_run=given.dry_run,
        plan=given.plan,
        resume=resume,
        resume_auto=given.resume == AUTO,
    )


def _find_run(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """(the run that --resume auto means, the overrides but for the folder to look in)."""
    settings = [(parse_override(text), text) for text in overrides]
    given = [str(setting.value) for setting, _ in settings if setting.key == RUNS_DIR]
    return newest_run(given[-1] if given else Training().runs_dir), [t for s, t in settings if s.key != RUNS_DIR]


def _resumed_config(run: str, overrides: Sequence[str]) -> Config:
    with TemporaryDirectory() as temporary:
        run_folder = fetch_config(run, Path(temporary)) if is_url(run) else Path(run)
        return load_config(_file_to_resume(run_folder, run, overrides), overrides)


def _file_to_resume(run_folder: Path, run: str, overrides: Sequence[str]) -> Path:
    file = run_folder / "config.yaml"
    if not isfile(file):
        found = "has no config.yaml" if isdir(run_folder) else "does not exist"
        raise UsageError(
            f"{COMMAND_LINE}: --resume {run}: that folder {found}, so there is no run to resume. "
            f"Give the folder or the URL of a run, such as runs/NAME; a run names its folder when it starts and ends."
        )
    for setting in map(parse_override, overrides):
        if find_option(setting.key) and not setting.key.startswith(RESUME_MAY_CHANGE):
            raise UsageError(
                f"{COMMAND_LINE}: {setting.key}={shown(setting.value)} cannot be set with --resume, because "
                f"a resumed run must compute what it would have computed undisturbed. Remove it, or start a "
                f"new run with --config {run}/config.yaml. With --resume you may set "
                f"{', '.join(f'{key}*' if key.endswith('.') else key for key in RESUME_MAY_CHANGE)}."
            )
    return file


class _Parser(argparse.ArgumentParser):
    """argparse, with the schema in its help, and mistakes as UsageError."""

    def error(self, message: str) -> NoReturn:
        dashed = re.search(r"--([\w.]+\.[\w.=]+)", message)
        hint = f" Options of the config take no dashes: {dashed[1]}." if dashed else ""
        raise UsageError(f"{COMMAND_LINE}: {message}.{hint} {self.prog} --help explains every option.")

    def format_help(self) -> str:
        width = max(60, shutil.get_terminal_size().columns - 2)
        return f"{super().format_help()}\n{explain_options(width)}"


def _parser(prog: str, default_config: Path | str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description="Trains a language model with GRPO.",
        usage=f"{prog} [--config X | --resume RUN] [--print-config] [--dry-run] [--plan] [section.key=value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="X",
        help=f"a YAML file, or a recipe by name: {', '.join(recipe_names())} (default: {default_config})",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help=f"go on with the run in this folder or at this URL, exactly; {AUTO}: with the newest in {RUNS_DIR} "
        "that has a checkpoint and is not finished",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything and stop before any actor starts")
    parser.add_argument("--plan", action="store_true", help="print the memory and time that a run takes here, and stop")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="set an option listed below, over the config; the value is YAML, such as 3, 1e-3, [0.9, 0.99] "
        "or null, and plain text where text is expected",
    )
    return parser


def explain_options(width: int) -> str:
    """Returns every option of the schema, by section: key, values taken, default, description."""
    wrapper = textwrap.TextWrapper(width, subsequent_indent="      ", break_on_hyphens=False)
    blocks: list[str] = []
    for section, title in SECTIONS.items():
        lines = wrapper.wrap(f"{section}: {title}")
        for option in OPTIONS.values():
            if option.key.rpartition(".")[0] == section:
                lines += wrapper.wrap(f"  {option.key}  {option.expected} (default: {shown(option.default)})")
                lines += wrapper.wrap(f"      {option.description}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
