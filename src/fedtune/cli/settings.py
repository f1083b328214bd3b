"""From command-line options to settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedtune.config import parse_assignment
from fedtune.config.load import flatten
from fedtune.settings import within
from fedtune.types import ConfigError, Problem


def words(text: str | None) -> list[str]:
    """Return the words of a comma list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def given(assignments: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return `--set` settings as layers, later over earlier."""
    return [*map(parse_assignment, assignments or [])]


def taken(
    assignments: Sequence[str] | None, places: Sequence[str], what: str, but: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return `--set` settings, all of which a command takes notice of, as layers.

    Args:
        assignments: as given.
        places: sections and keys that have an effect.
        what: what it is that they have an effect on.
        but: keys of these sections that have none.

    Raises:
        ConfigError: with each that has none.
    """
    layers = given(assignments)
    keys = [key for layer in layers for key in flatten(layer)]
    if wrong := [key for key in keys if not within(key, places) or within(key, but)]:
        fix = f"these have: {', '.join(places)}"
        raise ConfigError("command line", [Problem(f"--set {k}", f"has no effect on {what}", fix) for k in wrong])
    return layers
