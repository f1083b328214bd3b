"""Headers of safetensors files, checked before anything is loaded by them. No torch here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fedtune.io import decoded, parse_json
from fedtune.types import CorruptFileError

MAX_TENSOR_BYTES = 16 * 1024**3
MAX_HEADER_BYTES = 32 * 1024**2  # of some 150,000 tensors; parsed, it takes several times the room
MAX_AXES = 8
_BITS = {4: "F4", 6: "F6_E2M3 F6_E3M2", 8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"}
_BITS |= {16: "U16 I16 F16 BF16", 32: "U32 I32 F32", 64: "U64 I64 F64 C64"}
DTYPE_BITS = {name: size for size, names in _BITS.items() for name in names.split()}


def _whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _entry_problem(entry: Any, size: int) -> str:
    """Say what is wrong with one tensor's entry in the header of a file of `size` bytes, or return an empty text."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "is not dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"has the unknown dtype {str(dtype)[:20]!r}"
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(_whole(n, 2 * size) for n in shape):
        return "has a shape that is not a list of whole numbers this file has room for"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(n, size) for n in offsets):
        return "has data_offsets that are not two places in this file; cut off?"
    wanted = math.prod(shape) * DTYPE_BITS[dtype]
    if 8 * (offsets[1] - offsets[0]) != wanted:
        return f"has {offsets[1] - offsets[0]} bytes, its shape needs {-(-wanted // 8)}"
    return ""


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the parsed header, and the byte at which the numbers begin."""
    with open(path, "rb") as handle:
        head = handle.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise CorruptFileError(f"{path}: byte 0: header of {length} bytes in a file of {size}; cut off?")
        header = parse_json(decoded(handle.read(length), f"{path}: header"), f"{path}: header")
    if not isinstance(header, dict):
        raise CorruptFileError(f"{path}: header is not an object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise CorruptFileError(f"{path}: header: __metadata__ is not an object of texts")
    return header, 8 + length


def tensor_header(path: Path) -> dict[str, Any]:
    """Check a safetensors file's size and header before anything is loaded from it, and return the header.

    Returns:
        name -> {"dtype", "shape", "data_offsets"}, without the metadata entry. The tensors lie one after the
        other, without gaps, up to the end of the file.

    Raises:
        CorruptFileError: truncated, oversized, or inconsistent, with the byte or the tensor that says so.
    """
    if not path.is_file():
        raise CorruptFileError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_TENSOR_BYTES:
        raise CorruptFileError(f"{path}: {size} bytes, more than the {MAX_TENSOR_BYTES} an adapter may have")
    header, start = _read_header(path, size)
    for name, entry in header.items():
        if problem := _entry_problem(entry, size):
            raise CorruptFileError(f"{path}: header: {name[:100]!r} {problem}")
    end = 0
    for begin, until, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        if begin != end:
            raise CorruptFileError(
                f"{path}: byte {start + begin}: {name[:100]!r} overlaps another tensor or follows a gap"
            )
        end = until
    if start + end != size:
        raise CorruptFileError(f"{path}: byte {size}: {start + end} bytes announced; cut off?")
    return header
