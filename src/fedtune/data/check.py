"""Look at every training row before any of them trains; list all that is wrong at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedtune.data import conversation
from fedtune.data.files import MOST_NAMED, BadRow, Unreadable, kind_of
from fedtune.types import DataError, counted

COLUMNS = ("instruction", "input", "output")
_TEMPLATE = re.compile(r"### (Instruction|Response):|\{\{|<\|[a-z_]+\|>|\[/?INST\]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# what cannot be meant: lone surrogates, U+FFFD, controls, private use, marks that override the direction of writing
_ODD = re.compile(
    r"[\ud800-\udfff\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
    r"\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd\u202a\u202b\u202d\u202e]"
)


@dataclass(frozen=True)
class TrainRow:
    """One row to train on: a question and its answer in the benchmark's three columns, or a conversation.

    Attributes:
        instruction, input, output: empty where the row is a conversation.
        group: its value in the partition column.
        turns: question and answer of each turn of a conversation.
        columns: what an objective wants to know beside these.
    """

    instruction: str
    input: str
    output: str
    group: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return what the row is, as JSON types; what only some rows have is left out of the others."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("turns", "columns")}


# how a count of rows of each kind is told
WORDS = {
    "bad_row": "malformed",
    "missing_column": "without a required column",
    "not_text": "with a value that is not text",
    "bad_conversation": "with a malformed conversation",
    "empty_answer": "with an empty answer",
    "over_long": "cut to data.max_chars",
    "odd_unicode": "with unusual characters",
    "template_text": "with chat-template markup",
    "no_label_left": "without a label (the answer was cut off or not found)",
    "truncated": "cut to train.max_length",
}


@dataclass(frozen=True)
class RowProblem:
    """What is wrong with one row (0-based number in its source) and what was done about it."""

    row: int
    kind: str
    detail: str
    action: str


@dataclass(frozen=True)
class CheckedRows:
    """The rows that may train, and the report on all the others."""

    rows: tuple[TrainRow, ...]
    problems: tuple[RowProblem, ...]

    def counts(self) -> dict[str, int]:
        """Return how many rows have each kind of problem."""
        return dict(sorted(Counter(p.kind for p in self.problems).items()))

    def lines(self, most: int = 20) -> list[str]:
        """Return the report for people: counts first, then the rows with their numbers."""
        head = [f"{counted(n, 'row')} {WORDS[kind]}" for kind, n in self.counts().items()]
        shown = [f"row {p.row}: {p.kind.replace('_', ' ')} ({p.detail}): {p.action}" for p in self.problems[:most]]
        rest = len(self.problems) - most
        return head + shown + ([f"… and {rest} more"] if rest > 0 else [])


def _template(text: str) -> str:
    """Return the first words that belong to a chat template; empty if there are none.

    Braces that nothing closes are told by one look for the last that close, not by one from each of them.
    """
    closed = text.rfind("}}")
    for found in _TEMPLATE.finditer(text):
        if found[0] != "{{":
            return found[0]
        if found.end() <= closed:
            return text[found.start() : text.index("}}", found.end()) + 2]
    return ""


def unpaired(text: str) -> str:
    """Replace each half of a surrogate pair that stands alone, which no tokenizer can encode, by a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8") if _SURROGATE.search(text) else text


def not_text(value: Any) -> str:
    """Say why a value is not a text, or return an empty string."""
    if isinstance(value, str):
        return ""
    if isinstance(value, Unreadable):
        return value.reason
    return f"is {kind_of(value)}, not a text"


def has_columns(row: Mapping[str, Any]) -> str:
    """Name the columns that a row has, for an error about one it has not."""
    names = [str(name)[:60] for name in row]
    rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"its columns are {', '.join(names[:MOST_NAMED])}{rest}" if names else "it is empty"


@dataclass(frozen=True)
class _Source:
    """Where a source has what a row is made of; see `check`."""

    columns: Mapping[str, str]
    group: str
    wanted: Sequence[str]

    def of(self, column: str) -> str:
        """Return what the source calls a column of ours."""
        return self.columns.get(column, column)

    def talks(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row is a conversation: it has messages, and no columns of its own for question and answer."""
        own = (self.of("instruction"), self.of("output"))
        return self.of(conversation.COLUMN) in row and not any(column in row for column in own)

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the columns whose texts a row has to have, by our names; `input` may be missing."""
        return (*(() if self.talks(row) else COLUMNS), *self.wanted)


def _refusals(row: Mapping[str, Any], source: _Source) -> Iterator[tuple[str, str]]:
    """Yield kind and detail of what makes a row unusable."""
    if isinstance(row, BadRow):
        yield "bad_row", row.reason
        return
    sources = {column: source.of(column) for column in source.texts(row)}
    if missing := [f"no {name!r}" for column, name in sources.items() if name not in row and column != "input"]:
        yield "missing_column", f"{', '.join(missing)}; {has_columns(row)}"
        return
    names = [*sources.values()]
    if isinstance(row.get(source.group), Unreadable) and source.group not in names:
        names.append(source.group)
    found = ((name, not_text(row[name])) for name in names if row.get(name) is not None)
    unread = [("not_text", f"{name!r} {reason}") for name, reason in found if reason]
    yield from unread or _unanswered(row, source)


def _unanswered(row: Mapping[str, Any], source: _Source) -> Iterator[tuple[str, str]]:
    """Yield kind and detail of each text without a word that something is to be learned from."""
    for name in (source.of(c) for c in source.texts(row) if c not in ("instruction", "input")):
        if not (row[name] or "").strip():
            yield "empty_answer", repr(name)
    if source.talks(row):
        name = source.of(conversation.COLUMN)
        try:
            if not all(answer.strip() for _, answer in conversation.turns(row[name])):
                yield "empty_answer", repr(name)
        except ValueError as err:
            yield "bad_conversation", f"{name!r} {err}"


def _row(raw: Mapping[str, Any], source: _Source) -> TrainRow:
    """Return a row that nothing speaks against; rows without a value in the partition column share the empty one."""
    texts = {column: raw.get(source.of(column)) or "" for column in source.texts(raw)}
    key = raw.get(source.group) if source.group else None
    return TrainRow(
        **{column: texts.pop(column, "") for column in COLUMNS},
        group="" if key is None else str(key),
        turns=conversation.turns(raw[source.of(conversation.COLUMN)]) if source.talks(raw) else (),
        columns=texts,
    )


def _named(row: TrainRow) -> dict[str, str]:
    """Return the texts of a row by what they are called in a report; one column in two roles once."""
    texts = {"instruction": row.instruction, "input": row.input, "output": row.output}
    if row.group not in texts.values():
        texts["group"] = row.group
    said = [text for turn in row.turns for text in turn]
    return {**texts, **{f"message {number}": text for number, text in enumerate(said)}, **row.columns}


def _remarks(row: TrainRow, max_chars: int) -> Iterator[tuple[str, str, str]]:
    """Yield kind, detail and action of what is unusual about a row that still trains."""
    for column, text in _named(row).items():
        if len(text) > max_chars:
            yield "over_long", f"{column} has {len(text)} characters", "truncated"
        if odd := _ODD.search(text):
            yield "odd_unicode", f"U+{ord(odd[0]):04X} in {column}", "replaced" if _SURROGATE.search(text) else "kept"
        if template := _template(text):
            yield "template_text", f"{template[:30]!r} in {column}", "kept as plain text"


def _cleaned(row: TrainRow, max_chars: int) -> TrainRow:
    """Return a row whose texts are no longer than allowed, and can be encoded."""

    def cleaned(text: str) -> str:
        return unpaired(text[:max_chars])

    return TrainRow(
        cleaned(row.instruction),
        cleaned(row.input),
        cleaned(row.output),
        cleaned(row.group),
        tuple((cleaned(question), cleaned(answer)) for question, answer in row.turns),
        {name: cleaned(text) for name, text in row.columns.items()},
    )


def check(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str],
    group: str = "",
    max_chars: int = 100_000,
    wanted: Sequence[str] = (),
) -> CheckedRows:
    """Map columns and report every row that is not sound.

    Args:
        rows: as the source has them; one without question and answer may have a conversation as `messages`.
        columns: our column name -> the source's, where they differ.
        group: the source's partition column, if any.
        max_chars: longer texts are cut there and reported.
        wanted: columns of text that an objective wants beside ours.

    Returns:
        Rows that their file does not have whole, with a missing column, a value that is not text, a conversation out of
        turn, or an empty answer are dropped. Over-long texts are cut, wrongly encoded ones cleaned, and those with a
        template's tokens kept as plain text, the partition column as well. All are listed.
    """
    good: list[TrainRow] = []
    problems: list[RowProblem] = []
    source = _Source(columns, group, wanted)
    for number, raw in enumerate(rows):
        if refused := [RowProblem(number, *found, "dropped") for found in _refusals(raw, source)]:
            problems += refused
            continue
        row = _row(raw, source)
        problems += [RowProblem(number, *found) for found in _remarks(row, max_chars)]
        good.append(_cleaned(row, max_chars))
    return CheckedRows(tuple(good), tuple(problems))


def require(checked: CheckedRows, name: str) -> Sequence[TrainRow]:
    """Return the sound rows.

    Raises:
        DataError: none is left; the message lists what was wrong.
    """
    if checked.rows:
        return checked.rows
    if not checked.problems:
        raise DataError(f"{name}: no rows")
    reasons = {(p.kind, p.detail) for p in checked.problems}
    if len(reasons) == 1 and len(checked.problems) > 1:
        kind, detail = reasons.pop()
        raise DataError(f"{name}: no row can be trained on: {kind.replace('_', ' ')} in each ({detail})")
    raise DataError("\n  ".join([f"{name}: no row can be trained on", *checked.lines()]))
