"""What a person sees while a run goes on: a line for each event, and a live bar on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.jobs import current_job
from data.escaping import escaped

PHASES = ("sample", "verify", "update", "sync")


class Display:
    """`say` prints a line; `step` shows a finished step. Text from outside is escaped."""

    def __init__(self, live: str, console: Console | None = None) -> None:
        # A job's log is read as text, whatever the terminal was that the cluster was started from.
        terminal = None if current_job() is None else False
        self.console = console or Console(highlight=False, soft_wrap=True, force_terminal=terminal)
        wanted = live == "on" or (live == "auto" and self.console.is_terminal)
        self._progress = _progress(self.console) if wanted else None
        self._task = None if self._progress is None else self._progress.add_task("", total=1)

    def start(self, done: int, steps: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=steps, completed=done, line="")
            self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(escaped(text, keep="\n"), markup=False, emoji=False)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line a step: reward and accuracy (supervised: loss), tokens per second, seconds per phase."""
        sampled = "reward/mean" in metrics
        name, value = ("reward", metrics["reward/mean"]) if sampled else ("loss", metrics["policy/loss"])
        phases = " ".join(f"{phase} {metrics[f'time/{phase}']:.2f}" for phase in PHASES if f"time/{phase}" in metrics)
        parts = [f"{name} {value:.3f}"]
        if sampled:
            parts.append(f"correct {metrics['verdict/correct']:.1%}")
        parts += [f"{metrics['tokens/per_second']:.0f} tokens/s", f"{phases} s"]
        if not metrics["policy/updates"]:
            fired = ", ".join(name for name in metrics if name.startswith("guard/"))
            parts.append(f"no update: {fired if fired and metrics['policy/filtered'] < 1 else 'all filtered'}")
        elif sampled:
            parts.append(f"logp diff {metrics['rollout/logprob_diff']:.1e}")
        self.console.print(f"step {step:>4}  {'  '.join(parts)}")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, line=parts[0])


def _progress(console: Console) -> Progress:
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[line]}"), console=console, transient=True)
