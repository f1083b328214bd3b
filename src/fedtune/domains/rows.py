"""Take values out of an evaluation set's rows. What is not what the set promises is refused, by its column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.data.check import has_columns, not_text
from fedtune.data.files import Unreadable

Row = Mapping[str, Any]


def value(row: Row, column: str) -> Any:
    """Return a value. Raises ValueError where the row has none, naming its columns, and where it cannot be read."""
    if column not in row:
        raise ValueError(f"no {column!r}; {has_columns(row)}")
    if isinstance(found := row[column], Unreadable):
        raise ValueError(f"{column!r} {found.reason}")
    return found


def text(row: Row, column: str) -> str:
    """Return a text that is not blank. Raises ValueError."""
    found = value(row, column)
    if reason := not_text(found):
        raise ValueError(f"{column!r} {reason}")
    if not found.strip():
        raise ValueError(f"{column!r} is blank")
    return str(found)


def texts(row: Row, column: str) -> list[str]:
    """Return a list of texts; a single text is a list of one. Raises ValueError."""
    found = value(row, column)
    if isinstance(found, str):
        return [text(row, column)]
    if not isinstance(found, (list, tuple)) or not found:
        raise ValueError(f"{column!r} is not a list of texts")
    return [text({f"{column}[{i}]": part}, f"{column}[{i}]") for i, part in enumerate(found)]


def optional(row: Row, column: str) -> str:
    """Return what a row says of itself for breakdowns; an empty text where it says nothing."""
    found = row.get(column)
    return "" if found is None else str(found)


def number(row: Row, column: str) -> float:
    """Return a finite number, which may be written as text. Raises ValueError."""
    found = value(row, column)
    readable = isinstance(found, (int, float, str)) and not isinstance(found, bool)
    try:
        made = float(found) if readable else math.nan
    except (ValueError, OverflowError):
        made = math.nan
    if not math.isfinite(made):
        raise ValueError(f"{column!r} is {found!r:.60}, not a number")
    return made


def label(row: Row, column: str, least: int, most: int) -> int:
    """Return a whole number from `least` to `most`. Raises ValueError; published sets mark hidden answers by -1."""
    made = number(row, column)
    if made.is_integer() and least <= made <= most:
        return int(made)
    hidden = "; -1 stands for a hidden answer, take a split that has its answers" if made == -1 else ""
    raise ValueError(f"{column!r} is {row[column]!r:.60}, not one of {least} to {most}{hidden}")


def place(row: Row, column: str, answers: Sequence[str]) -> int:
    """Return which of the answers a row has: exactly one of them, letter by letter. Raises ValueError."""
    found = value(row, column)
    if not isinstance(found, str) or answers.count(found) != 1:
        shown = repr(found)[:60]
        listed = ", ".join(part[:40] for part in answers)
        raise ValueError(f"{column!r} is {shown}, not one of {listed}")
    return answers.index(found)
