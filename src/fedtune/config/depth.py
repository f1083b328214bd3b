"""How deep settings may go: reading a key costs the square of its parts, and no setting has more than a few."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

DEEPEST = 8

# comments and texts, so that what is left has dots in keys and numbers only. One that does not end goes to the end of
# the line, or of the file, where reading it fails anyway
_APART = re.compile(
    r"""#[^\n]*+|\"{3}(?:[^\\]|\\.?)*?(?:\"{3,5}|\Z)|'{3}.*?(?:'{3,5}|\Z)|"(?:[^"\\\n]|\\.?)*+(?:"|$)|'[^'\n]*+(?:'|$)""",
    re.DOTALL | re.MULTILINE,
)
_DEEP = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{DEEPEST}}}")


def parsed(text: str) -> dict[str, Any]:
    """Parse TOML in a time that grows with its length, however deep its keys go.

    Raises:
        ValueError: not TOML, a key of more than `DEEPEST` parts, or a whole number that TOML's 64 bits cannot hold.
    """
    rest = _APART.sub(lambda found: "" if found[0][0] == "#" else "x", text)
    if deep := _DEEP.search(rest):
        raise ValueError(f"the key {deep[0][:40]}... has more than {DEEPEST} parts")
    try:
        found = tomllib.loads(text)
    except RecursionError as err:
        raise ValueError("brackets stand inside each other without end") from err
    if large := _beyond(found):
        raise ValueError(f"{large} is a whole number of more than 64 bits")
    return found


def _beyond(tree: Any) -> str:
    """Return the start of a whole number beyond 64 bits, or an empty text: Python does not print the longest ones."""
    left = [tree]
    while left:
        value = left.pop()
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"{value:#x}"[:20] + "..."
        if isinstance(value, (dict, list)):
            left += value.values() if isinstance(value, dict) else value
    return ""


def too_deep(tree: Any) -> str:
    """Name the first value that lies deeper than any setting, or return an empty text."""
    level = [("", tree)]
    for _ in range(DEEPEST):
        level = [
            (f"{place}.{key}"[:200], inner)
            for place, value in level
            for key, inner in (value.items() if isinstance(value, Mapping) else enumerate(value))
            if isinstance(inner, (Mapping, list, tuple))
        ]
    return level[0][0][1:] if level else ""
