"""Scores of items with one right answer: the share that is right, its interval, and what needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedtune.config.schema import EvalSettings
from fedtune.domains.base import Item
from fedtune.evaluation import metrics
from fedtune.evaluation.scorers.base import Metric, Row, Sample, Scorer, pair, stray
from fedtune.results.schema import Score
from fedtune.results.stats import macro_f1, proportion_interval


def _notes(score: Score) -> str:
    valid = "unknown" if score.valid_rate is None else f"{score.valid_rate:.1%}"
    return f"valid answers: {valid}; always the majority class: {score.trivial['majority']:.4f}"


ACCURACY = Metric("accuracy", short="acc", hits=True, notes=_notes)
JUDGED = ("predicted", "correct", "strict", "valid")  # what a sample says that its answer gives


def trivial(gold: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy of the majority class and of always giving each answer."""
    counts = Counter(gold)
    n = len(gold)
    always = {f"always-{a}": counts[a] / n for a in answers} if n else {}
    return {"majority": max(always.values(), default=0.0), **always}


class Accuracy(Scorer):
    """Samples that are right or wrong: gold, predicted, correct, strict, valid, what could be answered, and the answer.

    Attributes:
        with_f1: whether the score has the macro F1 of the labels.
    """

    metric = ACCURACY
    with_f1: bool = False

    def failed(self, item: Item, why: str) -> Sample:
        """Return the row of an item that raised."""
        wrong = {"correct": False, "strict": False, "valid": False}
        return {"gold": item.gold_answer, "predicted": "", **wrong, "error": why}

    def summarise(self, task: str, rows: Sequence[Row], settings: EvalSettings | None = None, items: str = "") -> Score:
        """Return the share of right answers; of a published file's samples `valid` may be unknown."""
        rows, n = metrics.as_counted(rows), len(rows)
        why = metrics.withheld(rows, (settings or EvalSettings()).max_error_rate)
        gold = [str(r["gold"]) for r in rows]
        right = sum(bool(r["correct"]) for r in rows)
        known = [r["valid"] for r in rows if r.get("valid") is not None]
        return Score(
            task=task,
            mode=self.mode,
            metric=self.metric.name,
            n=n,
            score=None if why else right / n,
            interval=None if why else pair(proportion_interval(right, n)),
            strict=sum(bool(r["strict"]) for r in rows) / n if known and n else None,
            valid_rate=sum(map(bool, known)) / len(known) if known else None,
            macro_f1=macro_f1(gold, [str(r["predicted"]) for r in rows]) if self.with_f1 and n else None,
            errors=sum(bool(r.get("error")) for r in rows),
            withheld=why,
            trivial=trivial(gold, sorted({a for r in rows for a in r.get("answers", ())} | set(gold))),
            items_sha256=items,
        )

    def check_sample(self, row: Row) -> str:
        """Read a sample's own answer again."""
        try:
            made = self.sample(self.item(row), self.answer(row))
        except ValueError as err:
            return str(err)
        wrong = next((name for name in JUDGED if row.get(name) != made[name]), "")
        return f"{wrong} is {row.get(wrong)!r:.60}, it gives {made[wrong]!r:.60}" if wrong else stray(row, made)

    def check_failed(self, row: Row) -> str:
        """Say whether a sample without an answer has one, or no right answer."""
        if not self.may_be_right(row.get("gold")):
            return f"its right answer {row.get('gold')!r:.60} is none of its answers"
        made = self.failed(Item("", "", (row["gold"],), 0), "")
        wrong = next((name for name in JUDGED if row.get(name) != made[name]), "")
        return f"{wrong} is {row.get(wrong)!r:.60}, of an item that raised" if wrong else stray(row, made)

    def may_be_right(self, gold: Any) -> bool:
        """Tell whether an item of such a task can have this right answer."""
        return isinstance(gold, str)

    def foreign(self, row: Row, item: Item) -> str:
        """Say whether the right answer, or what may be answered, is not the item's."""
        if row.get("gold") != item.gold_answer:
            return "its right answer is not the item's"
        if not row.get("error") and row.get("answers", [*item.answers]) != [*item.answers]:
            return "its possible answers are not the item's"
        return super().foreign(row, item)

    def item(self, row: Row) -> Item:
        """Return a stranger's sample as the item that it says it is of. Raises ValueError."""
        gold = row.get("gold")
        if not isinstance(gold, str):
            raise ValueError(f"its right answer {gold!r:.60} is no text")
        return Item("", "", (gold,), 0)

    def answer(self, row: Row) -> Any:
        """Return what the solver gave, as a stranger's sample has it. Raises ValueError."""
        if not isinstance(row.get("output"), str):
            raise ValueError("it has no output")
        return row["output"]
