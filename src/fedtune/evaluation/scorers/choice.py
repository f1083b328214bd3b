"""Multiple choice and verdicts: the answer is a letter, or yes, no, maybe."""

from __future__ import annotations

from fedtune.domains.medical import VERDICTS
from fedtune.evaluation.extract import official_letter, official_verdict, strict_word, wrap
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.scorers.base import Sample, Solver
from fedtune.evaluation.scorers.likelihood import Likelihood
from fedtune.evaluation.scorers.official import Official
from fedtune.evaluation.scorers.questions import Form

# official extraction reads no letter after E
LETTERED = Form(official_letter, strict_word, known=tuple("ABCDE"), wrap=wrap)
VERDICT = Form(official_verdict, strict_word, answers=VERDICTS, wrap=wrap)


class OfficialChoice(Official):
    """Of items with equal prompts all get the last one's output; the log keeps what was generated and says so."""

    def solver(self) -> Solver:
        """Return what writes a few tokens for each question."""
        from fedtune.evaluation.solvers import Choices

        return Choices()

    def annotations(self, loaded: TaskItems) -> dict[int, Sample]:
        """Return, by the items' places, whose output overwrites theirs (`metrics.as_counted`)."""
        prompts = {place: item.prompt for place, item in zip(loaded.places, loaded.items, strict=True)}
        last = {prompt: place for place, prompt in prompts.items()}
        return {place: {"same_prompt_as": last[p]} for place, p in prompts.items() if last[p] != place}


CHOICE = {"likelihood": Likelihood(LETTERED), "official": OfficialChoice(LETTERED)}
BOOLEAN = {"likelihood": Likelihood(VERDICT), "official": OfficialChoice(VERDICT)}
