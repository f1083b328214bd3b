"""What a run tells whoever watches it. The command line draws it; tests and scripts use the silent one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.models.budget import Budget
    from fedtune.types import RoundRecord


class Reporter:
    """Receives a run's events; every method may be overridden, and none does anything here."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def plan(self, config: Config, budget: Budget) -> None:
        """The run is about to start: what it will need."""

    def training(self, arm: str, rounds: int, done: int) -> None:
        """Rounds of an arm begin, after `done` that are over."""

    def step(self, client: int, tokens: int, loss: float) -> None:
        """One optimiser step of one client is over."""

    def round(self, record: RoundRecord) -> None:
        """A round is over."""

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Items of a task have been evaluated."""

    def close(self) -> None:
        """The run is over, however it ended."""
