"""Questions scored as FlowerTune does, by what is read in the text that a model writes; a strict reading beside it."""

from __future__ import annotations

from pathlib import Path

from fedtune.data.check import has_columns
from fedtune.data.files import kind_of, parse_rows, read_text_file
from fedtune.domains.base import Item, Task
from fedtune.evaluation import known
from fedtune.evaluation.programs import MOST_BYTES
from fedtune.evaluation.scorers.base import Row, Sample
from fedtune.evaluation.scorers.questions import Questions
from fedtune.types import CorruptFileError

MOST_ROWS = 100_000  # of a published file; no set has a tenth of them


class Official(Questions):
    """What is read in an output counts."""

    mode = "official"
    uses = frozenset({"official_limit"})
    readings = ("official", "strict")

    def sample(self, item: Item, answer: str) -> Sample:
        """Return the row of an item, given the model's output."""
        read, strict = self.form.read(answer), self.form.strict(answer, item.answers)
        return {
            "gold": item.gold_answer,
            "predicted": read,
            "answers": list(item.answers),
            "correct": read == item.gold_answer.lower(),
            "strict": strict == item.gold_answer,
            "valid": strict is not None,
            "output": answer,
        }

    def _published_sample(self, row: Row) -> Sample:
        form = self.form
        answers = form.known or form.answers
        gold, output, is_text = form.published(row)
        if not isinstance(output, str):
            raise ValueError(f"output is {kind_of(output)}, not a text")
        if not isinstance(gold, str) or gold.lower() not in [answer.lower() for answer in answers]:
            raise ValueError(f"gold is {gold!r:.60}, not one of {', '.join(answers)}")
        read, strict = form.read(output), form.strict(output, answers) if is_text else None
        return {
            "gold": gold,
            "predicted": read,
            "correct": read == gold.lower(),
            "valid": strict is not None if is_text else None,
            "strict": strict is not None and strict.lower() == gold.lower(),
        }

    def published(
        self, task: Task, path: Path, reading: str, references: Path | None = None, *, as_asked: bool = True
    ) -> tuple[list[Sample], str]:
        """Read a JSON array or JSON lines, plain or gzipped; the content decides, not the name."""
        samples = self._read(path)
        if reading != self.mode:
            if any(s["valid"] is None for s in samples):
                said = "has mapped labels, not the model's text; only --mode official can score it"
                raise CorruptFileError(f"{path}: {said}")
            samples = [{**s, "correct": s["strict"]} for s in samples]
        placed = [{"i": i, "gold": s["gold"]} for i, s in enumerate(samples)]
        return samples, known.shortfall(task.name, "published", self.key, task.n, placed)

    def _read(self, path: Path) -> list[Sample]:
        samples = []
        for number, row in enumerate(parse_rows(read_text_file(path, MOST_BYTES), str(path), MOST_ROWS), 1):
            try:
                samples.append(self._published_sample(row))
            except KeyError as err:
                raise CorruptFileError(f"{path}: row {number} lacks {err.args[0]}; {has_columns(row)}") from err
            except ValueError as err:
                raise CorruptFileError(f"{path}: row {number}: {err}") from err
        if not samples:
            raise CorruptFileError(f"{path}: no rows")
        return samples
