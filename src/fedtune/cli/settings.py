"""From command-line options to validated settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune import settings
from fedtune.config import Settings, parse_assignment
from fedtune.config.load import flatten
from fedtune.settings import nested as options
from fedtune.types import ConfigError, Problem

__all__ = ["options", "resolve", "taken"]


def taken(assignments: Sequence[str], places: Sequence[str], what: str, but: Sequence[str] = ()) -> Sequence[str]:
    """Return `--set` settings, all of which a command takes notice of.

    Args:
        assignments: as given.
        places: sections and keys that have an effect.
        what: what it is that they have an effect on.
        but: keys of these sections that have none.

    Raises:
        ConfigError: with each that has none.
    """
    keys = [key for text in assignments for key in flatten(parse_assignment(text))]
    wrong = [key for key in keys if not _within(key, places) or _within(key, but)]
    if wrong:
        fix = f"these have: {', '.join(places)}"
        raise ConfigError("command line", [Problem(f"--set {k}", f"has no effect on {what}", fix) for k in wrong])
    return assignments


def _within(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def resolve(
    file: Path | None,
    chosen: dict[str, Any],
    assignments: Sequence[str],
    folder: Path | None = None,
    *,
    kept: bool = False,
    beside: Sequence[str] = (),
) -> Settings:
    """Validate file, shortcuts and `-s key=value`, later over earlier, as `fedtune.settings.resolve` does."""
    layers = [chosen, *map(parse_assignment, assignments)]
    return settings.resolve(file, layers, folder, kept=kept, beside=beside)
