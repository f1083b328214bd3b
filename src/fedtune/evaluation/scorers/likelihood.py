"""Questions scored by the likelihood of each answer: every model has one, whatever its manners of speech."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedtune.domains.base import Item
from fedtune.evaluation.scorers.base import Row, Sample, Solver
from fedtune.evaluation.scorers.questions import Questions

LEAST = -(2.0**128)  # likelihoods are made in float32, which has no number below it


def unusable(likelihoods: Sequence[float]) -> str:
    """Say why nothing follows from the log-likelihoods of an item's answers, or return an empty string."""
    if any(one > 0 for one in likelihoods):
        return "the model's likelihood of an answer is above 1"
    if not all(one <= 0 for one in likelihoods):  # the largest of several NaNs would be the first answer
        return "the model's likelihood of an answer is not a number"
    return "the model's likelihood of every answer is zero" if max(likelihoods) < LEAST else ""


class Likelihood(Questions):
    """The likeliest answer counts; what the solver gives is each answer's mean log-probability in nats per token."""

    mode = "likelihood"
    uses = frozenset({"prompt"})
    distinct = True

    def solver(self) -> Solver:
        """Return what reads likelihoods."""
        from fedtune.evaluation.solvers import Likelihoods

        return Likelihoods(self.form.wrap)

    def sample(self, item: Item, answer: Sequence[float]) -> Sample:
        """Return the row of an item, given the likelihood of each of its answers."""
        if why := unusable(answer):
            return self.failed(item, why)
        best = max(range(len(answer)), key=answer.__getitem__)
        right = best == item.gold
        return {
            "gold": item.gold_answer,
            "predicted": item.answers[best],
            "answers": list(item.answers),
            "correct": right,
            "strict": right,
            "valid": True,
            "scores": answer,
        }

    def answer(self, row: Row) -> list[float]:
        """Return the likelihoods of a stranger's sample. Raises ValueError."""
        scores = row.get("scores")
        numbers = isinstance(scores, list) and all(s is None or type(s) in (int, float) for s in scores)
        if not numbers or not scores or len(scores) != len(row.get("answers", ())):
            raise ValueError("it has not one likelihood for each answer")
        # JSON has no infinity: an answer whose likelihood is zero stands as null
        found = [-math.inf if s is None else s for s in scores]
        if why := unusable(found):
            raise ValueError(why)
        return found
