"""What a scorer is: how a task's answers are made, read, summed up, shown, and made again from a log. No torch.

Whatever needs a model is its solver's, which is imported when a model is asked.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedtune.config import Config
from fedtune.config.schema import EvalSettings
from fedtune.domains.base import Item, Task
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.retry import Failed
from fedtune.results.schema import Score
from fedtune.results.stats import Interval

Sample = dict[str, Any]
Row = Mapping[str, Any]


def _readable(score: Score) -> str:
    return "" if score.valid_rate is None else f"{score.valid_rate:.0%}"


def _details(score: Score) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in score.details.items())


@dataclass(frozen=True)
class Metric:
    """What the number of a score is, and how it is shown.

    Attributes:
        name: in files.
        short: in lm-eval's results and on the Hub, where it has another name there.
        table, report: the number's format on the terminal and in a report.
        averaged: whether it counts in a domain's average, and so in a board's ranks.
        hits: whether it is a whole number of right items out of all items.
        quality: the heading of a table's last column.
        quality_of: what that column says of a score.
        notes: what is said beside a single score.
    """

    name: str
    short: str = ""
    table: str = ".3f"
    report: str = ".1%"
    averaged: bool = True
    hits: bool = False
    quality: str = "valid"
    quality_of: Callable[[Score], str] = _readable
    notes: Callable[[Score], str] = _details


class Solver:
    """Makes a model's answers to items.

    Attributes:
        size: items of a batch, which are asked again together where one of them raises.
        whole: whether the other items of a batch decide an answer too; a log is then continued at a batch's beginning.
    """

    size: ClassVar[int]
    whole: ClassVar[bool] = False

    def check(self, tokenizer: Any, config: Config) -> None:
        """Refuse settings by which this model cannot be asked. Raises ModelError."""

    def prepared(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the model is asked."""
        return contextlib.nullcontext()

    def answers(
        self, model: Any, tokenizer: Any, loaded: TaskItems, first: int, last: int, config: Config
    ) -> Iterator[list[Any]]:
        """Yield the answers to items first..last-1, batch by batch and in order, in whatever form the scorer reads."""
        raise NotImplementedError


class Scorer(ABC):
    """Scores tasks of one kind in one mode.

    Attributes:
        mode: in results and in logs' names.
        metric: what its number is.
        uses: the settings of `eval` that change what it gives, of those that not every scorer uses.
        distinct: whether no two models give the same samples of a whole set.
        key: the value of a sample that says, with its place, which item it is of.
        samples_optional: whether a withheld score may have no samples, as the machine lacks what making them takes.
        readings: how a published file of answers can be read, the usual way first; none where nobody publishes any.
        needs_tests: whether a published file of answers needs one with tests beside it.
        takes_outputs: whether a sample may name another, whose output counts as its own (`metrics.as_counted`).
    """

    mode: str
    metric: ClassVar[Metric]
    uses: frozenset[str] = frozenset()
    distinct: bool = False
    key: ClassVar[str] = "gold"
    samples_optional: ClassVar[bool] = False
    readings: ClassVar[tuple[str, ...]] = ()
    needs_tests: ClassVar[bool] = False
    takes_outputs: ClassVar[bool] = False

    @abstractmethod
    def solver(self) -> Solver:
        """Return what makes the answers."""

    @abstractmethod
    def summarise(self, task: str, rows: Sequence[Row], settings: EvalSettings | None = None, items: str = "") -> Score:
        """Score a task from all its samples.

        Args:
            settings: of the evaluation; the defaults for answers that somebody published.
            items: hash of the items.
        """

    @abstractmethod
    def check_sample(self, row: Row) -> str:
        """Say in what a sample is not what its own answer gives, or return an empty string; a stranger wrote it."""

    def misjudged(self, row: Row) -> str:
        """Say in what a sample is not what its own answer gives, or it raised and counts; a stranger wrote it."""
        if type(row.get("i")) is not int:
            return "it has no place in the set"
        if "same_prompt_as" in row and not self.takes_outputs:
            return "it names another sample, which only those of official answers to questions do"
        if not row.get("error"):
            return self.check_sample(row)
        counts = any(row.get(k) for k in ("correct", "strict", "value", "valid", "predicted"))
        return "an item that raised has an answer or counts as right" if counts else self.check_failed(row)

    def check_failed(self, row: Row) -> str:
        """Say in what the sample of an item that raised is not as `failed` makes one; a stranger wrote it."""
        return ""

    def foreign(self, row: Row, item: Item) -> str:
        """Say in what a stranger's sample is not one of this item, or return an empty string."""
        return "" if row.get("group") == item.group else "its group is not the item's"

    def samples(self, loaded: TaskItems, first: int, answers: Sequence[Any], settings: EvalSettings) -> list[Sample]:
        """Read the answers to some items, one by one unless a scorer does otherwise.

        Args:
            first: which of the items the first answer is to.
            answers: the solver's; `Failed` stands for that to an item that raised.

        Returns:
            What the log says of each: its place in the set `i`, its group, and how it was answered.
        """
        made = []
        for number, answer in enumerate(answers, first):
            item = loaded.items[number]
            read = self.failed(item, answer.text) if isinstance(answer, Failed) else self.sample(item, answer)
            made.append({"i": loaded.places[number], "group": item.group, **read})
        return made

    def sample(self, item: Item, answer: Any) -> Sample:
        """Read the answer to one item: what its sample says beside its place and group."""
        raise NotImplementedError

    def failed(self, item: Item, why: str) -> Sample:
        """Return what the sample of an item that raised says: it is wrong, and never left out of the mean."""
        raise NotImplementedError

    def limit(self, settings: EvalSettings) -> int:
        """Return how many items are evaluated; 0 is all."""
        official = settings.official_limit if "official_limit" in self.uses else 0
        return min([n for n in (settings.limit, official) if n], default=0)

    def depends_on(self, config: Config) -> list[Any]:
        """Return the settings that samples depend on: a log made with others is not continued."""
        return [config.eval.prompt, config.prompt.model_dump(mode="json")]

    def annotations(self, loaded: TaskItems) -> dict[int, Sample]:
        """Return by an item's place what its sample says more, because of the other items of the set."""
        return {}

    def unavailable(self, task: Task) -> str:
        """Say why the samples cannot be made on this machine, or return an empty string.

        Raises:
            FedtuneError: nothing of this kind can be scored here at all.
        """
        return ""

    def check_log(self, rows: Sequence[Row], settings: EvalSettings) -> str:
        """Say in what sound samples are together not what the settings ask for, or return an empty string."""
        return ""

    def run_again(self, task: Task, rows: Sequence[Row], tests: Mapping[int, str] | None = None) -> Iterator[str]:
        """Yield what making the samples' outcomes again shows, where they have any and that can be done here.

        Args:
            tests: of the items, by their places; those of the known set, where it is at hand, by default.
        """
        yield from ()

    def not_run_again(self, task: Task) -> str:
        """Say why outcomes cannot be made again on this machine, or return an empty string."""
        return ""

    def published(
        self, task: Task, path: Path, reading: str, references: Path | None = None, *, as_asked: bool = True
    ) -> tuple[list[Sample], str]:
        """Read a file of answers that somebody published.

        Args:
            reading: one of `readings`.
            references: tests, where the kind has them; the set's own, or those published beside the file, by default.
            as_asked: whether `references` go before the set's own tests.

        Returns:
            The samples, and why they are not those of the whole known set; empty where they are.

        Raises:
            CorruptFileError: the file cannot be read so.
        """
        raise NotImplementedError


# what a model gave, and what came of it; a kind of samples has some of them
GIVEN = ("answers", "scores", "output", "value", "programs", "outcomes")


def stray(row: Row, own: Container[str]) -> str:
    """Say which answer a sample has that samples of its kind have not, or return an empty string."""
    extra = next((name for name in GIVEN if name in row and name not in own), "")
    return f"it has {extra}, which no such sample has" if extra else ""


def pair(interval: Interval | None) -> tuple[float, float] | None:
    """Return an interval as a score has it."""
    return (interval.low, interval.high) if interval else None
