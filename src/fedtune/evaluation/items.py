"""The items of a task, from a folder, the Hub or a package; all of them, or a seeded sample in file order."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from fedtune.config import Config
from fedtune.data import files, hub
from fedtune.data.check import unpaired
from fedtune.domains.base import Item, Row, Task
from fedtune.io import digest
from fedtune.machine import expanded
from fedtune.types import CorruptFileError, DataError, derive_seed

log = logging.getLogger("fedtune")

SETS_KEPT = 8  # in memory; no domain has more


@dataclass(frozen=True)
class TaskItems:
    """The items to be evaluated, their places in the whole set, and the hash that identifies them."""

    task: Task
    items: tuple[Item, ...]
    places: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class _File:
    """A file as it was found; two equal ones have the same rows, as far as this process can tell."""

    path: Path
    changed: tuple[int, int, int]


def _file(task: Task, folder: Path, domain: str) -> Path:
    places = (folder / "eval" / domain, folder / "eval", folder)
    found = files.find(task.file, *places)
    if not found:
        wanted = f"no {task.file}.jsonl(.gz), .json, .csv or .parquet for {task.name}"
        there = next((place for place in places if place.is_dir()), folder)
        raise DataError(f"{places[0]}: {wanted}; {files.listed(there)}")
    return found[0]


def _source(task: Task, config: Config) -> _File | None:
    """Return the file that a set is read from; None for a packaged set, and for one of the Hub."""
    if task.packaged or config.data.source != "folder":
        return None
    path = _file(task, expanded(config.data.path), config.domain).absolute()
    try:
        state = path.stat()
    except OSError as err:
        raise CorruptFileError(f"{path}: {err.strerror or err}") from err
    return _File(path, (state.st_ino, state.st_size, state.st_mtime_ns))


def _rows(task: Task, source: _File | None) -> Sequence[Row]:
    if task.packaged:
        return task.packaged()
    if source:
        return files.read_rows(source.path)
    rows: list[Row] = [row for part in task.hub for row in hub.load(part)]
    return task.select(rows) if task.select else rows


@lru_cache(maxsize=SETS_KEPT)
def _whole(task: Task, source: _File | None) -> tuple[Item, ...]:
    """Return all items of a set, read once for all models, modes and limits of a run."""
    rows = _rows(task, source)
    items = [_item(task, number, row) for number, row in enumerate(rows)]
    if hidden := items.count(None):
        log.info("%s: %d of %d rows have no answer of their own and are left out", task.name, hidden, len(rows))
    return tuple(item for item in items if item)


def _item(task: Task, number: int, row: Row) -> Item | None:
    """Make one item, its texts without halves of surrogate pairs, as training rows are."""
    if isinstance(row, files.BadRow):
        raise CorruptFileError(f"{task.name}: row {number}: {row.reason}")
    try:
        item = task.item(row)
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration, IndexError) as err:
        reason = str(err) if type(err) is ValueError else f"{type(err).__name__}: {err}"
        raise CorruptFileError(f"{task.name}: row {number} is not of this task: {reason}") from err
    return item and replace(
        item,
        prompt=unpaired(item.prompt),
        question=unpaired(item.question),
        answers=tuple(map(unpaired, item.answers)),
        group=unpaired(item.group),
    )


@lru_cache(maxsize=4 * SETS_KEPT)
def _chosen(task: Task, source: _File | None, limit: int) -> TaskItems:
    whole = _whole(task, source)
    if not whole:
        raise DataError(f"{task.name}: no items" + (f" in {source.path}" if source else ""))
    places = list(range(len(whole)))
    if limit and limit < len(whole):
        places = sorted(random.Random(derive_seed(42, "items", task.name)).sample(places, limit))
    items = tuple(whole[i] for i in places)
    return TaskItems(task, items, tuple(places), digest([asdict(i) for i in items]))


def load(task: Task, config: Config, limit: int) -> TaskItems:
    """Return a task's items; a set whose file has not changed is not read again.

    Args:
        limit: 0 for all; else a sample of this size, the same for every model, kept in file order.

    Raises:
        DataError, OfflineError, CorruptFileError: they cannot be had.
    """
    return _chosen(task, _source(task, config), limit)
