"""Held-out solutions: how likely each one is, in nats per token. There is nothing to be read, so no official mode."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.config.schema import EvalSettings
from fedtune.domains.base import Item
from fedtune.evaluation import metrics
from fedtune.evaluation.extract import wrap
from fedtune.evaluation.scorers.base import Metric, Row, Sample, Scorer, Solver, pair, stray
from fedtune.evaluation.scorers.likelihood import unusable
from fedtune.results.schema import Score
from fedtune.results.stats import mean_interval

NATS = Metric("nats_per_token", table=".4f", report=".4f", averaged=False)


class Solution(Scorer):
    """The mean log-likelihood of the solutions; higher is better."""

    mode = "likelihood"
    metric = NATS
    uses = frozenset({"prompt"})
    distinct = True

    def solver(self) -> Solver:
        """Return what reads likelihoods."""
        from fedtune.evaluation.solvers import Likelihoods

        return Likelihoods(wrap)

    def sample(self, item: Item, answer: Sequence[float]) -> Sample:
        """Return the row of a solution, given its likelihood."""
        if why := unusable(answer):
            return self.failed(item, why)
        return {"value": answer[0], "gold": "", "predicted": "", "correct": False}

    def failed(self, item: Item, why: str) -> Sample:
        """Return the row of a solution that raised, which has no likelihood, not even a bad one."""
        return {"value": None, "gold": "", "predicted": "", "correct": False, "error": why}

    def summarise(self, task: str, rows: Sequence[Row], settings: EvalSettings | None = None, items: str = "") -> Score:
        """Return the mean; withheld at the first error: an item that raised counts as wrong, not as any likelihood."""
        why = metrics.withheld(rows, 0.0)
        values = [float(r["value"]) for r in rows if r.get("value") is not None]
        mean = sum(values) / len(values) if values and not why else None
        return Score(
            task=task,
            mode=self.mode,
            metric=self.metric.name,
            n=len(rows),
            score=mean,
            interval=pair(mean_interval(values)) if mean is not None else None,
            errors=sum(bool(r.get("error")) for r in rows),
            withheld=why,
            items_sha256=items,
        )

    def check_sample(self, row: Row) -> str:
        """Say whether a sample's value is no log-likelihood, or is not all that it has."""
        if type(row.get("value")) not in (int, float):
            return "it has no value"
        return unusable([row["value"]]) or self._stray(row)

    def check_failed(self, row: Row) -> str:
        """Say whether a sample without a likelihood has one, even one of 1, or anything else."""
        return self._stray(row) if row.get("value") is None else "an item that raised has a value"

    def _stray(self, row: Row) -> str:
        return stray(row, ("value",)) or ("it has a right answer" if row.get("gold") else "")


SOLUTION = {"likelihood": Solution()}
