"""Read rows from local files: JSON lines, JSON, CSV and Parquet, the first three also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from pathlib import Path
from typing import Any

from fedtune.io import parse_json
from fedtune.types import CorruptFileError, DataError

MAX_FILE_BYTES = 4 * 1024**3
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

Row = dict[str, Any]


def read_text_file(path: Path) -> str:
    """Read a UTF-8 text file, gunzipped where its content (not its name) is gzip.

    Raises:
        CorruptFileError: unreadable, cut off, too large, or not UTF-8.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(raw)) as handle:
                raw = handle.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise CorruptFileError(f"{path}: more than {MAX_FILE_BYTES} bytes")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise CorruptFileError(f"{path}: byte {err.start} is not UTF-8") from err
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise CorruptFileError(f"{path}: not a whole gzip file: {err}") from err
    except OSError as err:
        raise CorruptFileError(f"{path}: {err.strerror or err}") from err


def parse_rows(text: str, where: str) -> list[Row]:
    """Parse one JSON array or one JSON object a line, whichever the text is.

    Raises:
        CorruptFileError: with the line that is wrong.
    """
    if text.lstrip()[:1] == "[":
        rows = parse_json(text, where)
    else:
        # not splitlines(): U+2028 and friends stand raw inside JSON strings
        lines = text.split("\n")
        rows = [parse_json(line, f"{where}: line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise CorruptFileError(f"{where}: row {number} is {type(row).__name__}, not an object")
    return list(rows)


def _read_csv(text: str, where: str) -> list[Row]:
    try:
        return [dict(r) for r in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    except csv.Error as err:
        raise CorruptFileError(f"{where}: {err}") from err


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as err:
        raise CorruptFileError(f"{path}: not a Parquet file: {err}") from err


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


def find(folder: Path, stem: str) -> list[Path]:
    """Return the files of `folder` whose name is `stem` (which may have wildcards) plus a known ending."""
    return sorted({p for suffix in SUFFIXES for p in folder.glob(stem + suffix)})
