"""Read rows from local files: JSON lines, JSON, CSV and Parquet, the first three also gzipped.

What is wrong with a single row or value stands in its place, as `BadRow` or `Unreadable`, so that whoever checks
the rows can report it with its number.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.io import parse_json, read_bytes
from fedtune.types import CorruptFileError, DataError

MAX_FILE_BYTES = 4 * 1024**3
MOST_ROWS, MOST_VALUES = 5_000_000, 50_000_000  # of a Parquet file, whose few bytes may stand for any number
MOST_NAMED = 12
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

Row = dict[str, Any]
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class BadRow(Row):
    """A row that its file does not have whole; it stands, without values, where the row would."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


@dataclass(frozen=True)
class Unreadable:
    """A value that its file has and Python cannot hold; it stands where the value would."""

    reason: str


def kind_of(value: Any) -> str:
    """Name what a JSON value is."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def read_text_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """Read a UTF-8 text file, gunzipped where its content (not its name) is gzip.

    Args:
        path: the file; a device or a FIFO is none.
        max_bytes: it may have, as it lies there and unzipped. No more are read.

    Raises:
        CorruptFileError: unreadable, cut off, too large, or not UTF-8.
    """
    try:
        raw = read_bytes(path, max_bytes)
        if raw[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(raw)) as handle:
                raw = handle.read(max_bytes + 1)
            if len(raw) > max_bytes:
                raise CorruptFileError(f"{path}: unzipped, more than the {max_bytes} bytes this file may have")
        if raw[:2] in _UTF_16 or b"\0" in raw[:2]:
            raise CorruptFileError(f"{path}: byte 0 is not UTF-8 but looks like UTF-16; save it as UTF-8")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise CorruptFileError(f"{path}: byte {err.start} is not UTF-8") from err
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise CorruptFileError(f"{path}: not a whole gzip file: {err}") from err
    except OSError as err:
        raise CorruptFileError(f"{path}: {err.strerror or err}") from err


def parse_rows(text: str, where: str, most: int | None = None) -> list[Row]:
    """Parse one JSON array or one JSON object a line, whichever the text is.

    Raises:
        CorruptFileError: with the line that is wrong, or more than `most` lines.
    """
    if text.lstrip()[:1] == "[":
        rows = parse_json(text, where)
    else:
        if most is not None and (count := text.count("\n")) > most:
            raise CorruptFileError(f"{where}: {count} lines, it may have {most}")
        # not splitlines(): U+2028 and friends stand raw inside JSON strings
        lines = text.split("\n")
        try:
            rows = [parse_json(line, f"{where}: line {n}") for n, line in enumerate(lines, 1) if line.strip()]
        except CorruptFileError as err:
            raise CorruptFileError(f"{err}{_not_lines(text)}") from err
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise CorruptFileError(f"{where}: row {number} is {kind_of(row)}, not an object")
    return list(rows)


def _not_lines(text: str) -> str:
    """Say what a text is that is not one JSON value a line, if that can be told."""
    if "\r" in text and "\n" not in text:
        return "; its lines end with CR alone, LF is wanted"
    try:
        whole = parse_json(text, "")
    except CorruptFileError:
        return ""
    return f"; it is {kind_of(whole)} over several lines: an array of rows, or one object a line, is wanted"


def _read_csv(text: str, where: str) -> list[Row]:
    csv.field_size_limit(MAX_FILE_BYTES)  # long texts are cut where rows are checked, as those of other files
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(header) == 1 and (mark := next((m for m in ";\t|" if m in header[0]), "")):
            raise CorruptFileError(f"{where}: line 1 is one column; it looks separated by {mark!r}, a comma is wanted")
        if twins := [name for name, count in Counter(header).items() if count > 1]:
            raise CorruptFileError(f"{where}: line 1: several columns are called {twins[0]!r:.60}")
        # without its folder: what is wrong with rows is packed into submissions
        name = Path(where).name
        return [_csv_row(header, cells, f"{name}: line {reader.line_num}") for cells in reader if cells]
    except csv.Error as err:
        raise CorruptFileError(f"{where}: line {reader.line_num}: {err}") from err


def _csv_row(header: Sequence[str], cells: Sequence[str], where: str) -> Row:
    if len(cells) != len(header):
        return BadRow(f"{where} has {len(cells)} cells, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> list[Row]:
    """Read column by column: a column that nobody asks for may hold what Python cannot."""
    import pyarrow
    import pyarrow.parquet

    if path.exists() and not path.is_file():
        raise CorruptFileError(f"{path}: is not a file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_expansion(file.metadata, path)
            columns = dict(_parquet_columns(file, path.name))
            return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as err:
        raise CorruptFileError(f"{path}: not a Parquet file: {err}") from err


def _check_expansion(metadata: Any, path: Path) -> None:
    """Refuse a Parquet file of more than can be held, by what it says of itself. Raises CorruptFileError."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    sizes = {
        "rows": (metadata.num_rows, MOST_ROWS),
        "values": (max(metadata.num_rows * metadata.num_columns, sum(c.num_values for c in chunks)), MOST_VALUES),
        "uncompressed bytes": (sum(c.total_uncompressed_size for c in chunks), MAX_FILE_BYTES),
    }
    for what, (count, most) in sizes.items():
        if count > most:
            raise CorruptFileError(f"{path}: {count} {what}, at most {most} are read; split it into smaller files")


def _parquet_columns(file: Any, where: str) -> Iterator[tuple[str, list[Any]]]:
    import pyarrow

    count = file.metadata.num_rows
    for name, times in Counter(file.schema_arrow.names).items():
        if times > 1:
            yield name, [Unreadable(f"is the name of {times} columns of {where}")] * count
            continue
        try:
            column = file.read(columns=[name]).column(name)
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as err:
            yield name, [Unreadable(f"of {where} cannot be read: {err}")] * count
        else:
            yield name, [_python(value, where) for value in column]


def _python(scalar: Any, where: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as err:
        return Unreadable(f"of {where} is not UTF-8 at its byte {err.start}")
    except (ValueError, OverflowError, TypeError, LookupError, ImportError):
        return Unreadable(f"of {where} is a {scalar.type} that Python cannot hold")


def read_rows(path: Path) -> list[Row]:
    """Read all rows of a file by its ending.

    Raises:
        CorruptFileError: with file and line.
        DataError: an ending that is not one of `SUFFIXES`.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; rows are read from {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        return _read_parquet(path)
    text = read_text_file(path)
    if name.endswith((".csv", ".csv.gz")):
        return _read_csv(text, str(path))
    return parse_rows(text, str(path))


def find(stem: str, *folders: Path) -> list[Path]:
    """Return the files of some folders whose name is `stem` (which may have wildcards) plus a known ending.

    Raises:
        DataError: two of them differ in ending or folder alone, so that which one is meant cannot be told.
    """
    found = [p for folder in folders for p in sorted({p for s in SUFFIXES for p in folder.glob(stem + s)})]
    by_stem: dict[str, Path] = {}
    for path in found:
        own = next(path.name.removesuffix(s) for s in SUFFIXES if path.name.endswith(s))
        if (other := by_stem.setdefault(own, path)) is not path:
            raise DataError(f"{other} and {path} are two files of one set; keep the one that is meant")
    return found


def listed(folder: Path) -> str:
    """Say what a folder has, for an error about what it has not."""
    try:
        names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    except OSError as err:
        return f"{folder}: {err.strerror or err}"
    rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{folder} has {', '.join(names[:MOST_NAMED]) + rest if names else 'nothing'}"
