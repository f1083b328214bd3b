"""How much the logs of a packed run may hold: they are measured line by line, before anything of them is kept."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

from fedtune.board.archive import inside
from fedtune.domains import TASKS
from fedtune.io import parse_json
from fedtune.types import FedtuneError, Problem

MAX_LOG, MAX_LOGS = 64 * 1024**2, 256 * 1024**2  # bytes of one log, and of all of a run, unpacked
MAX_ROWS = 20_000  # of a set whose size is not known
# of a line, which is one item: at most a thousand samples, each a program and its outcome
MAX_LINE = 8 * 1024**2
MAX_VALUES = 4_000_000  # of a log: a thousand samples of the largest set of programs have fewer


class _TooMuchError(Exception):
    """A log is not one that a run writes."""


def _values(line: bytes) -> int:
    """Return how many values a line has. Raises _TooMuchError where a run writes no such line."""
    if len(line) > MAX_LINE:
        raise _TooMuchError(f"has more than {MAX_LINE:,} bytes")
    try:
        row = parse_json(line.decode("utf-8-sig"), "it") if line.strip() else {}
    except (FedtuneError, ValueError) as err:
        raise _TooMuchError(f"is not JSON: {err}") from err
    if not isinstance(row, dict):
        raise _TooMuchError("is not an object")
    inside = [value for each in row.values() if isinstance(each, (list, dict)) for value in _of(each)]
    deeper = [value for each in inside if isinstance(each, (list, dict)) for value in _of(each)]
    if any(isinstance(value, (list, dict)) for value in deeper):
        raise _TooMuchError("has lists or objects deeper inside each other than a run writes them")
    return len(row) + len(inside) + len(deeper)


def _of(each: list[object] | dict[str, object]) -> list[object]:
    return list(each.values()) if isinstance(each, dict) else each


def _measured(path: Path, most: int) -> int:
    """Return how many bytes a log unpacks to. Raises _TooMuchError, or whatever gzip makes of a damaged file."""
    size, lines, values = 0, 0, 0
    with gzip.open(path) as file:
        while line := file.readline(MAX_LINE + 1):
            size, lines = size + len(line), lines + 1
            if size > MAX_LOG:
                raise _TooMuchError(f"unpacks to more than {MAX_LOG:,} bytes")
            # one before the items
            if lines > most + 1:
                raise _TooMuchError(f"unpacks to more lines than the {most:,} items that the set has")
            try:
                values += _values(line)
            except _TooMuchError as err:
                raise _TooMuchError(f"line {lines} {err}") from err
            if values > MAX_VALUES:
                raise _TooMuchError(f"has more than {MAX_VALUES:,} values")
    return size


def logs_fit(folder: Path) -> Iterator[Problem]:
    """Yield logs that are not packed, no gzip, cut off, or hold more than a run writes; nothing is kept of them."""
    total = 0
    for path in inside(folder, "evals"):
        name, task = str(path.relative_to(folder)), TASKS.get(path.name.partition(".")[0])
        # whoever reads a log asks what it holds, and not its name: what is not measured must not be read
        if not name.endswith(".jsonl.gz"):
            yield Problem(name, "is not packed; fedtune submit packs it as .jsonl.gz")
            continue
        try:
            total += _measured(path, (task.n if task else 0) or MAX_ROWS)
        except _TooMuchError as err:
            yield Problem(name, str(err))
        # zlib.error, EOFError, BadGzipFile: whatever gzip makes of a damaged file
        except Exception as err:
            yield Problem(name, f"is not a whole gzip file: {err}")
        if total > MAX_LOGS:
            yield Problem(folder.name, f"its logs unpack to more than {MAX_LOGS:,} bytes in all")
            return
