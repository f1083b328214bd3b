"""Where a measured row comes from: a table never shows rows of two machines, versions or commits as one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.results.manifest import code, machine, versions

Row = dict[str, Any]
KEYS = {"date", "machine", "versions", "code", "threads"}


def here(threads: int | None = None) -> dict[str, Any]:
    """Return what a row measured now says of itself."""
    known = {**machine(), "system": "Linux"}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": known,
        "versions": versions(),
        "code": code(),
        "threads": threads,
    }


def stamped(rows: Sequence[Row], origin: Mapping[str, Any]) -> list[Row]:
    """Return rows with their origin; those that have one keep it."""
    filled = {key: origin.get(key) for key in sorted(KEYS)}
    return [{**row, "made": row.get("made", filled)} for row in rows]


def _same(made: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what rows of one table have in common; on which day each was made does not matter."""
    box = {k: made["machine"].get(k) or 0 for k in ("processor", "cpus", "gpus")}
    source = (made.get("code") or {}).get("sha256")
    return repr(sorted(box.items())), repr(sorted(made["versions"].items())), source, made.get("threads")


def together(rows: Sequence[Row]) -> list[list[Row]]:
    """Return stamped rows by origin, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if set(row["made"]) != KEYS:
            raise ValueError(f"a row says {sorted(row['made'])} of itself, not {sorted(KEYS)}")
        found.setdefault(_same(row["made"]), []).append(row)
    return list(found.values())


def said(rows: Sequence[Row]) -> str:
    """Return the origin of rows that have one in common, in a line."""
    made = rows[0]["made"]
    box, source = made["machine"], made.get("code") or {}
    commit = f"commit {source['commit'][:10]}" if source.get("commit") else "commit not recorded"
    if source.get("dirty"):
        commit += " with changes"
    threads = f", {made['threads']} threads" if made.get("threads") else ""
    dates = sorted({row["made"]["date"] or "no date" for row in rows})
    torch = made["versions"].get("torch", "unknown")
    where = f"{box['processor']}, {box['cpus']} cores{threads}, CPU, float32"
    return f"{where}, torch {torch}, {commit}, {' and '.join(dates)}"
