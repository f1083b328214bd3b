"""Multiple choice and verdicts: the answer is a letter, or yes, no, maybe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtune.config.schema import EvalSettings
from fedtune.domains.medical import VERDICTS
from fedtune.evaluation.extract import official_letter, official_verdict, strict_word, wrap
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.scorers.base import Row, Sample, Solver
from fedtune.evaluation.scorers.likelihood import Likelihood
from fedtune.evaluation.scorers.official import Official
from fedtune.evaluation.scorers.questions import Form

# official extraction reads no letter after E
LETTERED = Form(official_letter, strict_word, known=tuple("ABCDE"), wrap=wrap)
VERDICT = Form(official_verdict, strict_word, answers=VERDICTS, wrap=wrap)


class OfficialChoice(Official):
    """Of items with equal prompts all get the last one's output; the log keeps what was generated and says so."""

    takes_outputs = True

    def solver(self) -> Solver:
        """Return what writes a few tokens for each question."""
        from fedtune.evaluation.solvers import Choices

        return Choices()

    def annotations(self, loaded: TaskItems) -> dict[int, Sample]:
        """Return, by the items' places, whose output overwrites theirs (`metrics.as_counted`)."""
        prompts = {place: item.prompt for place, item in zip(loaded.places, loaded.items, strict=True)}
        last = {prompt: place for place, prompt in prompts.items()}
        return {place: {"same_prompt_as": last[p]} for place, p in prompts.items() if last[p] != place}

    def check_log(self, rows: Sequence[Row], settings: EvalSettings) -> str:
        """Say which sample names one that cannot be the last with its prompt; in a log cut off that may be to come."""
        there = {row["i"]: row for row in rows}
        wrong = next((row for row in rows if "same_prompt_as" in row and not _may_name(row, there)), None)
        return f"item {wrong['i']} names a sample that cannot have its prompt" if wrong else ""


def _may_name(row: Row, there: Mapping[int, Row]) -> bool:
    """Tell whether the sample that one names comes later, names none itself, and has the same possible answers."""
    place = row["same_prompt_as"]
    if type(place) is not int or place <= row["i"]:
        return False
    last = there.get(place)
    if last is None:
        return place > max(there)
    answers = row.get("answers"), last.get("answers")
    return "same_prompt_as" not in last and (None in answers or answers[0] == answers[1])


CHOICE = {"likelihood": Likelihood(LETTERED), "official": OfficialChoice(LETTERED)}
BOOLEAN = {"likelihood": Likelihood(VERDICT), "official": OfficialChoice(VERDICT)}
