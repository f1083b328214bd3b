"""Files that survive a crash, and readers that never trust what they read. No torch here."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import socket
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtune.types import CorruptFileError, LockedError, MissingFileError

MAX_JSON_BYTES = 512 * 1024**2


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash at any instant leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def finite(value: Any) -> Any:
    """Return `value` with None for every NaN and infinity inside: what Python writes for them is not JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def canonical(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, no NaN. Raises ValueError on NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`, as hex."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write strict, indented JSON atomically; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # only half a surrogate pair cannot be encoded, and its backslash form is the one JSON has for it
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twin, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twin[:60]!r} stands twice in one object")
    return made


def _too_deep(text: str, value: Any) -> bool:
    """Tell whether a document is nested deeper than any of ours: whoever goes through it later may call itself."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, (dict, list))]
    return bool(level)


def parse_json(text: str, where: str) -> Any:
    """Parse strict JSON (no NaN, no name twice in one object, no more than `DEEPEST` levels).

    Raises:
        CorruptFileError: with `where` and the place inside the text.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as err:
        raise CorruptFileError(f"{where}: line {err.lineno}, column {err.colno}: {err.msg}") from err
    except (ValueError, RecursionError) as err:
        raise CorruptFileError(f"{where}: {err}") from err
    if _too_deep(text, value):
        raise CorruptFileError(f"{where}: is nested deeper than {DEEPEST} levels")
    return value


DEEPEST = 100
DEEPEST_FOLDER = 20
# what a shell puts in a file's place: fedtune run --config <(cat settings.toml)
_GIVEN_PIPES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a file that is one: a FIFO that lies in its place would be waited for, a device be read without end.

    Raises:
        MissingFileError: it does not exist.
        CorruptFileError: neither file nor folder, or of more than `max_bytes`.
    """
    try:
        found = path.stat()
        given = str(path).startswith(_GIVEN_PIPES)
        if not (given or stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise CorruptFileError(f"{path}: is neither a file nor a folder")
        with open(path, "rb") as handle:
            raw = handle.read(max_bytes + 1) if given else b"" if found.st_size > max_bytes else handle.read()
    except (FileNotFoundError, NotADirectoryError) as err:
        raise MissingFileError(f"{path}: no such file") from err
    except OSError as err:
        raise CorruptFileError(f"{path}: {err.strerror or err}") from err
    if (size := max(len(raw), found.st_size)) > max_bytes:
        raise CorruptFileError(f"{path}: {size} bytes, more than the {max_bytes} this file may have")
    return raw


def decoded(raw: bytes, where: str) -> str:
    """Decode UTF-8. Raises CorruptFileError with the byte that is not."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise CorruptFileError(f"{where}: byte {err.start} is not UTF-8") from err


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Read a UTF-8 file of at most `max_bytes`. Raises CorruptFileError: missing, too large, or not UTF-8."""
    return decoded(read_bytes(path, max_bytes), str(path))


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read one strict JSON document of at most `max_bytes`. Raises CorruptFileError."""
    return parse_json(read_text(path, max_bytes), str(path))


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Give an error a name where a document is valid JSON and yet not what was written: lists for tables, other keys.

    Raises:
        CorruptFileError: with `what`, in place of what a value of another kind makes Python raise.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as err:
        said = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
        raise CorruptFileError(f"{what}: is not of its format ({said})") from err


def _lines(rows: Sequence[Any]) -> bytes:
    # in ASCII: half a surrogate pair comes back, and U+2028 ends a line for no reader
    return "".join(json.dumps(finite(r), allow_nan=False) + "\n" for r in rows).encode("ascii")


def only_files(folder: Path, which: str = "**/*") -> None:
    """Refuse a folder with a link, a FIFO or a device in it: what is read from it, or written into it, stays in it.

    The folder may itself be a link to one; `which` is a pattern of the names that matter.

    Raises:
        MissingFileError: there is no such folder. CorruptFileError: with the first of them.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder")
    only_shallow(folder)
    for path in sorted(folder.glob(which)):
        _check_kind(path)


def only_shallow(folder: Path) -> None:
    """Refuse folders inside each other without end, before anything walks through them. Raises CorruptFileError."""
    level = [str(folder)]
    for _ in range(DEEPEST_FOLDER + 1):
        level = [e.path for place in level for e in list(os.scandir(place)) if e.is_dir(follow_symlinks=False)]
    if level:
        raise CorruptFileError(f"{level[0][:200]}: lies more than {DEEPEST_FOLDER} folders deep")


def _check_kind(path: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise CorruptFileError(f"{path}: is a link, which is not followed here; put the file itself in its place")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CorruptFileError(f"{path}: is neither a file nor a folder")


def _open_own(path: Path, flags: int) -> int:
    """Open a file for writing where it lies: what a link in its place leads to is somebody else's.

    Raises:
        CorruptFileError: it is a link, or no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        _check_kind(path)
    # O_NOFOLLOW, O_NONBLOCK: whatever is put there after the look at it
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def append_lines(path: Path, rows: Sequence[Any]) -> None:
    """Append JSON lines and force them to disk. Raises CorruptFileError where the file is a link, or none."""
    with open(_open_own(path, os.O_WRONLY | os.O_APPEND), "ab") as handle:
        handle.write(_lines(rows))
        handle.flush()
        os.fsync(handle.fileno())


def read_lines(path: Path, *, torn_tail: bool = False) -> list[Any]:
    """Read a JSON-lines file; a missing file is an empty one. Only a line feed ends a line.

    Args:
        path: the file.
        torn_tail: drop a last line that a crash cut off instead of raising.

    Raises:
        CorruptFileError: with file and line number.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, MAX_JSON_BYTES).split(b"\n")
    rows: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            rows.append(parse_json(decoded(line, where), where))
        except CorruptFileError:
            if torn_tail and number == len(lines):
                break
            raise
    return rows


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Replace a JSON-lines file atomically."""
    write_bytes(path, _lines(rows))


def update_lines(path: Path, rows: Sequence[Any]) -> None:
    """Replace a JSON-lines file atomically if it does not already hold these rows and nothing else."""
    data = _lines(rows)
    if not path.exists() or path.stat().st_size != len(data) or path.read_bytes() != data:
        write_bytes(path, data)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go when the process dies, however it dies.

    Raises:
        LockedError: naming the pid and host of the owner.
        CorruptFileError: its lock is a link, or no file.
    """
    with open(_open_own(folder / "lock", os.O_RDWR | os.O_APPEND), "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            handle.seek(0)
            owner = handle.read().strip() or "an unknown process"
            raise LockedError(f"{folder} is in use by {owner}; wait for it, or choose another --out") from err
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield
