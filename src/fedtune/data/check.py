"""Look at every training row before any of them trains; list all that is wrong at once."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedtune.types import DataError

COLUMNS = ("instruction", "input", "output")
DROPPED = frozenset({"missing_column", "not_text", "empty_answer"})
_TEMPLATE = re.compile(r"### (Instruction|Response):|\{\{.*?\}\}|<\|[a-z_]+\|>|\[/?INST\]", re.S)


@dataclass(frozen=True)
class TrainRow:
    """One training example in the benchmark's three columns; `group` is the natural key of its source."""

    instruction: str
    input: str
    output: str
    group: str = ""


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
        head = [f"{kind}: {n}" for kind, n in self.counts().items()]
        shown = [f"row {p.row}: {p.kind} ({p.detail}): {p.action}" for p in self.problems[:most]]
        rest = len(self.problems) - most
        return head + shown + ([f"… and {rest} more"] if rest > 0 else [])


def _odd(text: str) -> str:
    """Name the first character that cannot be meant: lone surrogates, controls, bidi overrides, U+FFFD."""
    for char in text:
        if char in "\n\t\r":
            continue
        if char == "\ufffd" or unicodedata.category(char) in ("Cs", "Cc", "Co") or char in "\u202a\u202b\u202d\u202e":
            return f"U+{ord(char):04X}"
    return ""


def _unpaired(text: str) -> str:
    """Replace lone surrogates, which no tokenizer can encode, by U+FFFD."""
    return text.encode("utf-8", "replace").decode("utf-8") if _has_surrogate(text) else text


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _refusals(number: int, row: Mapping[str, Any], columns: Mapping[str, str]) -> list[RowProblem]:
    """Return what makes a row unusable."""
    found = []
    for column in COLUMNS:
        source = columns.get(column, column)
        if source not in row:
            if column != "input":
                found.append(RowProblem(number, "missing_column", f"no {source!r}", "dropped"))
        elif row[source] is not None and not isinstance(row[source], str):
            found.append(RowProblem(number, "not_text", f"{source!r} is {type(row[source]).__name__}", "dropped"))
        elif column == "output" and not (row[source] or "").strip():
            found.append(RowProblem(number, "empty_answer", repr(source), "dropped"))
    return found


def _remarks(number: int, row: TrainRow, max_chars: int) -> list[RowProblem]:
    """Return what is odd about a row that still trains."""
    found = []
    for column in COLUMNS:
        text = getattr(row, column)
        if len(text) > max_chars:
            found.append(RowProblem(number, "over_long", f"{column} has {len(text)} characters", "truncated"))
        if odd := _odd(text):
            action = "replaced" if _has_surrogate(text) else "kept"
            found.append(RowProblem(number, "odd_unicode", f"{odd} in {column}", action))
        if match := _TEMPLATE.search(text):
            shown = match[0][:30]
            found.append(RowProblem(number, "template_text", f"{shown!r} in {column}", "kept as plain text"))
    return found


def check(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], group: str = "", max_chars: int = 100_000
) -> CheckedRows:
    """Map columns and report every row that is not sound.

    Args:
        rows: as the source has them.
        columns: our column name -> the source's, where they differ.
        group: the source's column with the natural key, if any.
        max_chars: longer texts are cut there and reported.

    Returns:
        Rows with a missing column, a value that is not text, or an empty answer are dropped; over-long,
        oddly encoded and template-bearing ones are cut, mended or kept as plain text. All are listed.
    """
    good: list[TrainRow] = []
    problems: list[RowProblem] = []
    for number, raw in enumerate(rows):
        refused = _refusals(number, raw, columns)
        problems += refused
        if refused:
            continue
        texts = {c: raw.get(columns.get(c, c)) or "" for c in COLUMNS}
        row = TrainRow(**texts, group=str(raw.get(group, "")) if group else "")
        problems += _remarks(number, row, max_chars)
        good.append(replace(row, **{c: _unpaired(t[:max_chars]) for c, t in texts.items()}))
    return CheckedRows(tuple(good), tuple(problems))


def require(checked: CheckedRows, name: str) -> Sequence[TrainRow]:
    """Return the sound rows.

    Raises:
        DataError: none is left; the message lists what was wrong.
    """
    if not checked.rows:
        raise DataError("\n  ".join([f"{name}: no row can be trained on", *checked.lines()]))
    return checked.rows
