"""The whole evaluation sets as this package knows them: by hashes only, so that a log can be held against them.

A set is known by one hash over all its samples in order: place, right answer (of programs the problem's name), and
whose output the official evaluation counts (`same_prompt_as`). A log that leaves items out, repeats one, or says
another right answer has another hash. It cannot show whether a prompt was another one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from fedtune.io import digest

Rows = Sequence[Mapping[str, Any]]


@functools.cache
def sets() -> dict[str, dict[str, list[str]]]:
    """Return the hashes of the whole set by task and by mode; `official` only where equal prompts make a difference."""
    text = (resources.files("fedtune.evaluation") / "known_sets.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def samples_sha256(rows: Rows, key: str) -> str:
    """Return the hash of a log's samples as far as their set decides them.

    Args:
        key: the value that says, with its place, which item a sample is of: its right answer or its name.
    """
    return digest([[r.get("i"), r.get(key), r.get("same_prompt_as")] for r in rows])


def shortfall(task: str, mode: str, key: str, n: int, rows: Rows) -> str:
    """Say why samples are not those of a task's whole known set, or return an empty string.

    Args:
        key: as `samples_sha256` takes it.
        n: how many items the whole set has; 0 where that is not known.
        rows: the samples, without the log's first line.
    """
    known = sets().get(task)
    if known is None:
        return "no whole set of this task is known"
    wanted = known.get(mode) or known["any"]
    if samples_sha256(rows, key) in wanted:
        return ""
    if n and len(rows) != n:
        return f"{len(rows):,} items, the whole set has {n:,}"
    return "its items or their right answers are not those of the known set"
