"""Regular expressions in an adapter's settings, as PEFT applies them to the names of layers. No torch here.

A few letters can keep Python's `re` busy for years, and nothing stops it from within. So patterns that are more than
a name are first tried on all names in a process of their own, which can be ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from fedtune.types import AdapterError

_NAME = re.compile(r"[\w.]*")
# to compile a class of letters can take milliseconds
MOST_CLASSES = 500
_KEPT = 500  # patterns that `re` keeps compiled; of more, each is compiled anew for each layer
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for name in names:
    for _, _, expression, whole in patterns:
        (re.fullmatch if whole else re.match)(expression, name)
"""


class Pattern(NamedTuple):
    """A field's pattern, the expression that PEFT makes of it, and whether that has to match a whole name."""

    field: str
    written: str
    expression: str
    whole: bool = False


def malformed(patterns: Sequence[Pattern]) -> str:
    """Name the first pattern that is none, with the reason, or return an empty string."""
    if (classes := sum(pattern.expression.count("[") for pattern in patterns)) > MOST_CLASSES:
        return f"{patterns[0].field}: has {classes:,} classes of letters, at most {MOST_CLASSES:,} are taken"
    for pattern in patterns:
        try:
            re.compile(pattern.expression)
        except (re.error, RecursionError, OverflowError) as err:
            return f"{pattern.field}: {pattern.written!r} is not a pattern: {err}"
    return ""


def try_patterns(patterns: Sequence[Pattern], names: Sequence[str], seconds: float = 10.0) -> None:
    """Refuse patterns that cannot be applied to all names within some seconds. Raises AdapterError."""
    if len(patterns) <= _KEPT and all(_NAME.fullmatch(pattern.written) for pattern in patterns):
        return
    words = [sys.executable, "-I", "-c", _TRY]
    told = json.dumps([list(patterns), list(names)]).encode()
    try:
        subprocess.run(words, input=told, capture_output=True, timeout=seconds, check=True)  # noqa: S603
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as err:
        raise AdapterError(
            f"its patterns cannot be applied to the names of {len(names)} layers in {seconds:g} s; name the layers, "
            "or use fewer wildcards"
        ) from err
