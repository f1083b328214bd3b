"""What a domain is: data, as one object. No code path of the program knows a domain's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedtune.data.hub import HubSet
from fedtune.domains import rows

Row = rows.Row
LETTERS = "ABCDEFGHIJ"
SENTIMENTS = ("negative", "neutral", "positive")


@dataclass(frozen=True)
class Item:
    """One evaluation item.

    Attributes:
        prompt: the official prompt, before any wrapping.
        question: the same question for the training prompt or a chat template.
        answers: what may be answered: option letters or label words; for a solution, the solution itself; for
            a program, its tests.
        gold: index into `answers`.
        group: a category (an MMLU subject), for breakdowns.
    """

    prompt: str
    question: str
    answers: tuple[str, ...]
    gold: int
    group: str = ""

    def __post_init__(self) -> None:
        """Refuse a gold that is none of the answers, also one that would count from the end. Raises ValueError."""
        if not 0 <= self.gold < len(self.answers):
            raise ValueError(f"gold {self.gold} is none of the {len(self.answers)} answers")

    @property
    def gold_answer(self) -> str:
        """The right answer's text."""
        return self.answers[self.gold]


@dataclass(frozen=True)
class Task:
    """One evaluation set: where its rows are and how a row becomes an item.

    Attributes:
        name: on the command line and in results.
        kind: names its scorers (`fedtune.evaluation.scorers`), which decide how it is asked, read and scored.
        item: one row -> one item; None leaves the row out (no gold).
        hub: the sets on the Hub, in the benchmark's order; empty for a packaged set.
        file: the stem of its file under `eval/<domain>/` of a data folder.
        packaged: builds the rows from a registry package.
        select: keeps and orders the Hub's rows as the benchmark does (its own test split).
        n: how many items the whole set has.
        language: of programs.
        stop: words at which a completion ends.
        length: tokens of prompt and completion together in the official generation of programs.
        max_new_tokens: caps the official generation of a packaged set; 0 is the benchmark's own limit.
    """

    name: str
    kind: str
    item: Callable[[Row], Item | None]
    hub: tuple[HubSet, ...] = ()
    file: str = ""
    packaged: Callable[[], Sequence[Row]] | None = None
    select: Callable[[Sequence[Row]], Sequence[Row]] | None = None
    n: int = 0
    language: str = ""
    stop: tuple[str, ...] = ()
    length: int = 1024
    max_new_tokens: int = 0


@dataclass(frozen=True)
class TrainingSet:
    """A training set: its honest name, where its rows are, and which of its columns are ours.

    Attributes:
        name: recorded in every result.
        hub: on the Hub.
        packaged: builds the rows from a registry package.
        columns: our column -> the source's, where they differ.
        group: the partition column.
    """

    name: str
    hub: HubSet | None = None
    packaged: Callable[[], Sequence[Row]] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Domain:
    """One domain of the benchmark.

    Attributes:
        name: on the command line and in results.
        title: for people.
        training: the benchmark's own training set.
        packaged: the training set that comes inside registry packages.
        tasks: the benchmark's evaluation sets.
        packaged_tasks: those that come inside registry packages, under names of their own.
        group: the partition column of a data folder's training files.
    """

    name: str
    title: str
    training: TrainingSet
    packaged: TrainingSet
    tasks: tuple[Task, ...]
    packaged_tasks: tuple[Task, ...]
    group: str = ""


def multiple_choice(instruction: str, text: str, options: Sequence[str], gold: int, group: str = "") -> Item:
    """Build a multiple-choice item with the benchmark's prompt.

    A question that ends with neither `?` nor `.` gets a `?`, as the benchmark's formatter does. Raises ValueError
    where there are more options than letters, or the gold is none of them.
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options, more than the {len(LETTERS)} there are letters for")
    if not text.endswith(("?", ".")):
        text += "?"
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    body = f"{instruction}\nQuestion: {text}\n\nOptions:\n{listed}\n"
    return Item(f"{body}The answer is:\n", body.rstrip("\n"), tuple(LETTERS[: len(options)]), gold, group)


def sentiment(text: str, label: int, noun: str) -> Item:
    """Build a sentiment item (label 0 negative, 1 neutral, 2 positive) with the benchmark's prompt."""
    ask = f"What is the sentiment of this {noun}? Please choose an answer from {{negative/neutral/positive}}."
    prompt = f"Instruction: {ask}\nInput: {text}\nAnswer: "
    return Item(prompt, f"{ask} {text}", SENTIMENTS, label, noun)


def lettered(row: Row, instruction: str, group: str = "") -> Item | None:
    """Build an item from `question`, `options` ("A. …", a line each) and `answer` ("B. …").

    Lines without a letter continue the option before them. None where the answer is not among the options.
    """
    options: list[str] = []
    for line in rows.text(row, "options").strip().split("\n"):
        mark = f"{LETTERS[len(options)]}. " if len(options) < len(LETTERS) else "\0"
        if line.startswith(mark):
            options.append(line.removeprefix(mark).strip())
        elif options:
            options[-1] = f"{options[-1]} {line.strip()}"
    answer = rows.text(row, "answer").strip()
    gold = LETTERS.find(answer[:1]) if answer[1:2] == "." else -1
    if not 0 <= gold < len(options):
        return None
    return multiple_choice(instruction, rows.text(row, "question"), options, gold, group)
