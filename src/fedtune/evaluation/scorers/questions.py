"""Questions with a few possible answers: the form of their prompts and answers, however they are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedtune.domains.base import LETTERS, Item
from fedtune.evaluation.scorers.accuracy import Accuracy
from fedtune.evaluation.scorers.base import Row


def gold_and_output(row: Row) -> tuple[Any, Any, bool]:
    """Return the right answer and the model's output of a published row. Raises KeyError, naming what it lacks."""
    if missing := [k for k in ("gold", "output") if row.get(k) is None]:
        raise KeyError(" and ".join(missing))
    return row["gold"], row["output"], True


@dataclass(frozen=True)
class Form:
    """One form of question.

    Attributes:
        read: what FlowerTune reads in an output; it is right if that is the right answer in lower case.
        strict: the answer that an output is, out of those it may be; None if it is none.
        answers: what may be answered; empty for the letters of as many options as an item has.
        known: what is a right answer in a published file, where that is not `answers`.
        wrap: the official prompt around an item's own.
        with_f1: whether a score has the macro F1 of the labels.
        published: a published row's right answer, output, and whether that is the model's own text and not what was
            read in it. Raises KeyError.
    """

    read: Callable[[str], str]
    strict: Callable[[str, tuple[str, ...]], str | None]
    answers: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    wrap: Callable[[str], str] = str
    with_f1: bool = False
    published: Callable[[Row], tuple[Any, Any, bool]] = gold_and_output


class Questions(Accuracy):
    """Scores questions of one form.

    Args:
        form: theirs.
    """

    def __init__(self, form: Form) -> None:
        self.form = form
        self.with_f1 = form.with_f1

    def item(self, row: Row) -> Item:
        """Return the question that a stranger's sample says it is of, by its possible answers. Raises ValueError."""
        answers, gold = row.get("answers"), row.get("gold")
        if not isinstance(answers, list) or answers != list(self.form.answers or LETTERS[: len(answers)]):
            raise ValueError("its possible answers are not those of the task")
        if gold not in answers:
            raise ValueError(f"its right answer {gold!r:.60} is none of its answers")
        return Item("", "", tuple(answers), answers.index(gold))

    def may_be_right(self, gold: Any) -> bool:
        """Tell whether an item of such a task can have this right answer."""
        return gold in (self.form.answers or [*LETTERS])
