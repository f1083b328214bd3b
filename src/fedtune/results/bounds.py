"""What may stand in an entry, however deep: numbers that every reader can hold, texts that show what they say."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, Field

LARGEST_INT = 2**53 - 1  # what a browser holds exactly
LARGEST = 1e100  # squares and sums over seeds stay finite
MOST_TEXT, MOST_REASON, DEEPEST = 10_000, 500, 12
Count = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Amount = Annotated[float, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]

# markup, controls, surrogates, private use, marks that turn the direction, and what shows nothing
_MARKUP = re.compile(
    "[<>\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\uf8ff\ufe00-\ufe0e\ufeff\uffa0\ufff0-\uffff\U0001bca0-\U0001bca3"
    "\U0001d159\U0001d173-\U0001d17a\U000e0000-\U0010ffff]"
    # joiners and the emoji selector belong between or after letters of other scripts; in Latin text they show nothing
    "|(?<![^\x00-\x7f])[\u200c\u200d\ufe0f]|[\u200c\u200d](?![^\x00-\x7f])"
)

_KEPT = "\n\t\xa0\u3000\u200c\u200d"  # line ends, other blanks, and the joiners of other scripts


def plain_text(value: str) -> str:
    """Return a text that may stand on the page, or raise: no markup, controls, direction marks, unseen characters."""
    if _MARKUP.search(value):
        raise ValueError("has markup, control, invisible or direction-changing characters; write plain text")
    return value


def as_reason(value: str) -> str:
    """Return a text of this program's, which may quote any other, as one that may stand on the page: one line."""
    shown = " ".join(value.replace("->", "\u2192").replace("<", "\u2039").replace(">", "\u203a").split())
    plain = "".join(c if c.isprintable() or c in _KEPT else "?" for c in shown)[:MOST_REASON].rstrip()
    while (less := _MARKUP.sub("?", plain)) != plain:  # whether a joiner may stand depends on its neighbours
        plain = less
    return plain


def _text(value: str, most: int) -> str:
    if len(value) > most:
        return f"has {len(value):,} characters, at most {most:,} are taken"
    unseen = next((c for c in value if not c.isprintable() and c not in _KEPT), "")
    return f"has U+{ord(unseen):04X}, which shows nothing or steers what shows it" if unseen else ""


def _number(value: float) -> str:
    if isinstance(value, int):
        return (
            "" if abs(value) <= LARGEST_INT else f"is a whole number of {value.bit_length()} bits, at most 53 are taken"
        )
    return "" if math.isfinite(value) and abs(value) <= LARGEST else f"is {value}, at most {LARGEST} is taken"


def unbounded(value: Any, where: str = "", depth: int = 0) -> str:
    """Name the first value inside `value` that no page could show, as `path: what`; empty if there is none."""
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, (dict, list, tuple)):
        if depth > DEEPEST:
            return f"{where}: is nested more than {DEEPEST} deep"
        named = list(value.items() if isinstance(value, dict) else enumerate(value))
        keys = (unbounded(key, f"a name in {where}", depth + 1) for key, _ in named)
        # the names are cut, for they are written out for every value below them
        parts = (unbounded(part, f"{where}.{key!s:.80}".lstrip("."), depth + 1) for key, part in named)
        return next(filter(None, keys), "") or next(filter(None, parts), "")
    if isinstance(value, str):
        # packed bits are the one long text: one character for six items
        said = _text(value, 100 * MOST_TEXT if where.endswith(".bits") else MOST_TEXT)
    else:
        said = _number(value) if isinstance(value, (int, float)) else ""
    return f"{where}: {said}" if said else ""
