"""Live progress: a line that redraws on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fedtune.experiment.reporter import Reporter
from fedtune.types import counted, last_line, plain

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.models.budget import Budget
    from fedtune.types import RoundRecord

QUIET_SECONDS = 15.0


class PlainConsole(Console):
    """A console that takes every text, of tables too, as it stands: names, paths and errors come from outside."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text without markup, emoji or control characters in it."""
        options.update(markup=False, emoji=False, highlight=False)
        return super().render_str(plain(text), **options)


def terminal(*, errors: bool = False) -> Console:
    """Return the console that commands print on: standard output, or standard error."""
    return PlainConsole(stderr=errors)


def size(count: float) -> str:
    """Return bytes for people (powers of 1024)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def clock(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TerminalReporter(Reporter):
    """Draws a run on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._rounds = self._done = self._steps = self._all = self._expected = self._tokens = self._bytes = 0
        self._loss = 0.0
        self._arm = ""
        self._began = self._spoke = time.monotonic()

    def _draw(self, text: str, done: float, total: float) -> None:
        """Redraw the bar, or say something once in a while where there is none."""
        if not self.live:
            if time.monotonic() - self._spoke > QUIET_SECONDS:
                self._spoke = time.monotonic()
                self.note(text)
            return
        if self._bar is None:
            self._bar = Progress(
                BarColumn(24), TextColumn("{task.description}", markup=False), console=self.console, transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=1)
        self._bar.update(self._task, completed=done, total=max(total, 1), description=plain(text))

    def note(self, text: str) -> None:
        """Print a remark above the progress; whatever is in it is shown as it stands."""
        self.console.print(Text(plain(text)))

    def plan(self, config: Config, budget: Budget) -> None:
        """Say what the run will need."""
        self._expected = config.train.max_steps * config.federation.cohort_size
        wire = "bytes on the wire depend on the course of the run"
        if budget.per_round is not None and budget.total is not None:
            wire = f"{size(budget.per_round)} per round on the wire, {size(budget.total)} in all"
        self.note(
            f"plan: {counted(config.federation.rounds, 'round')}; {config.federation.cohort_size} of "
            f"{counted(config.federation.clients, 'client')} per round; {counted(config.train.max_steps, 'step')} of "
            f"{counted(config.train.batch, 'example')} per client; "
            f"{budget.trainable:,} trainable parameters; {wire}; "
            f"memory about {size(budget.model)} model + {size(budget.training)} training"
        )

    def training(self, arm: str, rounds: int, done: int) -> None:
        """Start the clock of an arm."""
        self._arm, self._rounds, self._done = arm, rounds, done
        self._steps = self._all = self._tokens = self._bytes = 0
        self._began = time.monotonic()

    def step(self, client: int, tokens: int, loss: float) -> None:
        """Count a step and redraw."""
        self._steps += 1
        self._all += 1
        self._tokens += tokens
        self._loss = loss
        elapsed = max(time.monotonic() - self._began, 1e-9)
        done = self._done + (self._steps / self._expected if self._expected else 0)
        missing = self._expected * (self._rounds - self._done) - self._steps
        left = elapsed / self._all * max(missing, 0)
        now = min(self._done + 1, self._rounds)
        self._draw(
            f"{self._arm} round {now}/{self._rounds}  client {client}  loss {loss:.3f}  "
            f"{self._tokens / elapsed:.0f} tokens/s  {size(self._bytes)}  {clock(left)} left",
            done,
            self._rounds,
        )

    def round(self, record: RoundRecord) -> None:
        """Print a round's line; it stays."""
        self._bytes += record.bytes_down + record.bytes_up
        self._done, self._steps = record.round, 0
        self._expected = self._expected or 1
        elapsed = time.monotonic() - self._began
        loss = "-" if record.loss is None else f"{record.loss:.4f}"
        self.note(
            f"{self._arm} round {record.round}/{self._rounds}: {record.status}, "
            f"{len(record.clients)}/{len(record.cohort)} clients, loss {loss}, "
            f"{size(record.bytes_down + record.bytes_up)}, {clock(elapsed)} so far"
        )
        for rejection in record.rejected:
            self.note(f"  client {rejection.client} not used: {rejection.reason}: {last_line(rejection.detail)}")
        self._spoke = time.monotonic()

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Show how far an evaluation is."""
        self._draw(f"evaluating {what}  {done}/{total}", done, total)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
