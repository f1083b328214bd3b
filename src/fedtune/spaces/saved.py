"""The layers of an adapter's file, by its header alone, and the names that mean them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.names import PREFIX
from fedtune.types import AdapterError

MAX_LAYERS, MAX_NAME, MAX_PARTS = 20_000, 1_000, 40  # layers of an adapter, letters and parts of a layer's path
FLOATS = {"F64", "F32", "F16", "BF16"}


def by_layer(header: Mapping[str, Any], tails: Sequence[str], what: str) -> dict[str, dict[str, list[int]]]:
    """Return the shapes of an adapter's tensors by the path of their layer and the end of their name.

    Args:
        header: of the file.
        tails: the ends that names may have.
        what: such a tensor is called.

    Raises:
        AdapterError: a tensor of another name or dtype, or more layers or longer names than any model has.
    """
    parts: dict[str, dict[str, list[int]]] = {}
    if len(header) > len(tails) * MAX_LAYERS:
        raise AdapterError(f"has {len(header):,} tensors, at most {len(tails) * MAX_LAYERS:,} are taken")
    for name, entry in header.items():
        if len(name) > MAX_NAME or name.count(".") >= MAX_PARTS:
            most = f"at most {MAX_NAME:,} letters and {MAX_PARTS} parts are taken"
            raise AdapterError(f"{name[:200]}... is no layer's name: {most}")
        tail = next((tail for tail in tails if name.endswith(tail)), "")
        path = name.removeprefix(PREFIX).removesuffix(tail)
        if not tail or not path or not name.startswith(PREFIX):
            raise AdapterError(f"{name[:200]} is no {what} of an adapter")
        if entry["dtype"] not in FLOATS:
            raise AdapterError(f"{name[:200]} is {entry['dtype']}, one of {', '.join(sorted(FLOATS))} wanted")
        parts.setdefault(path, {})[tail] = entry["shape"]
    return parts


def ends(path: str) -> set[str]:
    """Return every name by which a target means a layer: its path, and each end of it that begins after a dot."""
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}
