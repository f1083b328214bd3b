"""Side adapters on a client's disk: what all clients of a run have alike is stored once.

Every client has the same columns from the first one on, some more and some fewer. So they are cut into blocks of
columns, and a block is a file named by its content, which each client's round holds on to by a hard link. A block that
nobody holds any more is deleted. A file system without hard links gets copies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fedtune.io import write_bytes
from fedtune.names import BASE_A, BASE_B
from fedtune.tensors import tensor_header
from fedtune.types import CorruptFileError

COLUMNS = 64
_AXES = {BASE_A: 0, BASE_B: 1}


def axis_of(name: str) -> int | None:
    """Return the axis along which a side adapter grows; None for any other tensor."""
    return next((axis for end, axis in _AXES.items() if name.endswith(end)), None)


def _cut(sides: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield blocks of columns of all side adapters, the first columns first."""
    axes = {name: axis_of(name) or 0 for name in sides}
    longest = max((t.shape[axes[n]] for n, t in sides.items()), default=0)
    for start in range(0, longest, COLUMNS):
        yield {
            name: tensor.narrow(axes[name], start, min(COLUMNS, tensor.shape[axes[name]] - start)).contiguous()
            for name, tensor in sides.items()
            if tensor.shape[axes[name]] > start
        }


def _part(place: Path, number: int) -> Path:
    return place.with_name(f"{place.stem}.base-{number:04d}")


def _hold(block: Path, link: Path, data: bytes) -> None:
    """Link to a block, which is written if it is not there; another process may delete it in between."""
    while True:
        if not block.exists():
            write_bytes(block, data)
        try:
            os.link(block, link)
            return
        except FileNotFoundError:
            continue
        except OSError:
            write_bytes(link, data)
            return


class Blocks:
    """The blocks of a run's clients.

    Args:
        folder: where; the clients' own folders are beside it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, place: Path, sides: Mapping[str, Tensor]) -> int:
        """Store side adapters for a client's file; return in how many blocks."""
        self.drop(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        count = 0
        for count, block in enumerate(_cut(sides), 1):
            data = safetensors.torch.save(block)
            name = f"{hashlib.sha256(data).hexdigest()}.safetensors"
            _hold(self._folder / name, _part(place, count - 1), data)
        return count

    def load(self, place: Path, count: int) -> dict[str, Tensor]:
        """Return the side adapters of a client's file.

        Raises:
            CorruptFileError: a block is missing or damaged.
        """
        pieces: dict[str, list[Tensor]] = {}
        for number in range(count):
            part = _part(place, number)
            if not part.is_file():
                raise CorruptFileError(
                    f"{place}: block {number + 1} of {count} of its side adapters is missing: {part}"
                )
            tensor_header(part)
            for name, tensor in safetensors.torch.load_file(part).items():
                pieces.setdefault(name, []).append(tensor)
        return {name: torch.cat(found, dim=axis_of(name) or 0) for name, found in pieces.items()}

    def drop(self, place: Path) -> None:
        """Let go of the blocks of a client's file, and delete those that nobody holds."""
        held = list(place.parent.glob(f"{place.stem}.base-*"))
        for part in held:
            part.unlink(missing_ok=True)
        for block in self._folder.glob("*.safetensors") if held else ():
            with contextlib.suppress(FileNotFoundError):
                if block.stat().st_nlink == 1:
                    block.unlink()
