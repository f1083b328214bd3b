"""Sentiment: the answer is negative, neutral or positive."""

from __future__ import annotations

from typing import Any

from fedtune.domains.base import SENTIMENTS
from fedtune.evaluation.extract import official_label, strict_label
from fedtune.evaluation.scorers.base import Row, Solver
from fedtune.evaluation.scorers.likelihood import Likelihood
from fedtune.evaluation.scorers.official import Official
from fedtune.evaluation.scorers.questions import Form


def _published(row: Row) -> tuple[Any, Any, bool]:
    text = row.get("out_text", row.get("output"))
    gold = row.get("new_target", row.get("target", row.get("gold")))
    output = text if text is not None else row.get("new_out")
    if gold is None or output is None:
        raise KeyError("new_target and new_out (or target and out_text, or gold and output)")
    return gold.lower() if isinstance(gold, str) else gold, output, text is not None


class OfficialSentiment(Official):
    """The label in the text that is written."""

    def solver(self) -> Solver:
        """Return what writes until the label is fixed."""
        from fedtune.evaluation.solvers import Sentiments

        return Sentiments()


LABEL = Form(official_label, strict_label, answers=SENTIMENTS, with_f1=True, published=_published)
SENTIMENT = {"likelihood": Likelihood(LABEL), "official": OfficialSentiment(LABEL)}
