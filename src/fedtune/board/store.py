"""The store of entries: a folder of JSON files in git. What is in it is never overwritten by another run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtune.board.archive import MAX_TEXT
from fedtune.io import parse_json, read_json, read_text, write_json
from fedtune.results.entry import Entry
from fedtune.types import CorruptFileError, DataError, FedtuneError, Problem, plain

# a later state is never taken back by adding the same submission again
STATES = ("reported", "re-scored", "re-run", "flagged")


def read_entry(path: Path, most: int = MAX_TEXT) -> Entry:
    """Read an entry of at most `most` bytes: written out in the store it is longer than a submitter can make it.

    Raises:
        CorruptFileError: not JSON, too large, or not an entry; with the first reason.
    """
    try:
        return Entry.model_validate(parse_json(read_text(path, most), str(path)))
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise CorruptFileError(f"{path}: {where}: {first['msg']}") from err


def _plain(entry: Entry) -> Any:
    return json.loads(json.dumps(entry.model_dump(mode="json")))


def _same_submission(one: Entry, two: Entry) -> bool:
    """Tell whether two entries are of one submission: the same files, or where there are none the same scores."""
    if one.files or two.files:
        return (one.team, one.files) == (two.team, two.files)
    return (one.kind, one.team, one.claims, one.arms) == (two.kind, two.team, two.claims, two.arms)


def settled(store: Path, entry: Entry) -> Entry:
    """Return an entry as it goes into the store: of a submission that is there already, a later state and a flag stay.

    Raises:
        DataError: another submission has this recipe and seed.
        CorruptFileError: what is there cannot be read.
    """
    target = store / entry.place()
    if not target.exists():
        return entry
    there = read_entry(target)
    if not _same_submission(there, entry):
        raise DataError(f"{target}: there is an entry of this recipe and seed already, and it is another one")
    if STATES.index(there.state) > STATES.index(entry.state):
        return entry.model_copy(update={"state": there.state, "reasons": there.reasons})
    return entry


def write_entry(store: Path, entry: Entry) -> Path:
    """Put an entry at its place in the store. Raises as `settled` does."""
    target, plain = store / entry.place(), _plain(settled(store, entry))
    if not target.exists() or read_json(target) != plain:
        write_json(target, plain)
    return target


def holds(store: Path, entry: Entry) -> bool:
    """Tell whether the store has this very submission already, checked when it was added."""
    target = store / entry.place()
    if not target.exists():
        return False
    there = read_entry(target)
    return bool(there.files) and there.state != "reported" and _same_submission(there, entry)


def duplicate(store: Path, entry: Entry) -> Path | None:
    """Return another place in the store whose entry has the very same samples, if there is one."""
    for path, other in readable(store):
        if path != store / entry.place() and entry.same_samples(other):
            return path
    return None


def left_out_line(where: object, err: Exception) -> str:
    """Return one line on what is left out of a board, and why."""
    return plain(f"{where}: left out: {' '.join(str(err).split()) or type(err).__name__}", 500)


def readable(store: Path, left_out: list[str] | None = None) -> Iterator[tuple[Path, Entry]]:
    """Yield the entries of a store that can be read, each once, in the order of their paths.

    `left_out` takes a line for each other file, with the reason.
    """
    seen: dict[tuple[Path, str], Path] = {}
    for path in sorted(store.rglob("*.json")):
        try:
            entry = read_entry(path)
            if first := seen.get((entry.place(), entry.team)):
                raise DataError(f"{first.relative_to(store)} has this recipe and seed already")
        except FedtuneError as err:
            if left_out is not None:
                fault = CorruptFileError(str(err).replace(f"{path}: ", ""))
                left_out.append(left_out_line(path.relative_to(store), fault))
            continue
        seen[entry.place(), entry.team] = path
        yield path, entry


def by_hand(before: Path, after: Path) -> Iterator[Problem]:
    """Yield what was changed in a store beside flags: the one thing that people may write into it.

    Raises:
        CorruptFileError: an entry cannot be read.
    """
    for store in (before, after):
        if store.is_symlink() or not store.is_dir():
            what = "is a link, or no folder" if os.path.lexists(store) else "no such folder"
            yield Problem(str(store), what, "the store is a folder of entries")
            return
    old, new = ({p.relative_to(s): p for p in s.rglob("*") if p.name != "README.md"} for s in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            yield Problem(str(name), "is new or gone; entries are written by the board, not by hand")
        elif new[name].is_symlink() or new[name].is_dir() != old[name].is_dir():
            yield Problem(str(name), "is a link, or a folder in place of a file")
        elif old[name].is_file() and old[name].read_bytes() != new[name].read_bytes():
            yield from _beside_flags(str(name), read_entry(old[name]), read_entry(new[name]))


def _beside_flags(name: str, old: Entry, new: Entry) -> Iterator[Problem]:
    same = {"state": "reported", "reasons": []}
    if _plain(old.model_copy(update=same)) != _plain(new.model_copy(update=same)):
        yield Problem(name, "differs in more than its flag; entries are written by the board, not by hand")
    elif new.state not in ("flagged", "reported") or (new.state == "flagged") != bool(new.reasons):
        yield Problem(name, "a flag is state flagged with reasons, and taken back it is reported without any")
