"""Folders of plain tensors (IA3's vectors, whole models) aggregated one tensor at a time: no client is held whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedtune.io import read_json, write_json
from fedtune.lora.state import to_tensors
from fedtune.methods import Method, ServerState, aggregation
from fedtune.models.adapter_config import MOST_BYTES
from fedtune.models.folder import FileTensors, FolderPlain, as_bytes
from fedtune.models.source import CONFIG, settings_files
from fedtune.types import AdapterError


@dataclass(frozen=True, eq=False)
class ByTensor(Mapping[str, Tensor]):
    """What a method's server half makes of clients' tensors, each when it is asked for.

    Attributes:
        method: which; defined on tensors whatever they stand for.
        clients: their folders, which have the same tensors.
        examples: of each.
        start: what the clients started from.
        round: which round it is.
    """

    method: Method
    clients: Sequence[FolderPlain]
    examples: Sequence[float]
    start: FolderPlain
    round: int

    def __getitem__(self, name: str) -> Tensor:
        """Aggregate one tensor."""
        before = ServerState(self.start.only(name), self.round - 1)
        after, _ = aggregation.aggregate(self.method, [c.only(name) for c in self.clients], self.examples, before)
        return to_tensors(after.adapter)[name]

    def __iter__(self) -> Iterator[str]:
        """Name the tensors."""
        return iter(self.start.tensors)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.start.tensors)


def write(tensors: ByTensor, out: Path, base: str | None = None) -> None:
    """Write a folder with the files of the first client and other tensors; it appears whole.

    Args:
        tensors: what is made of the clients'.
        out: the new folder.
        base: the base model's name in an adapter's settings, where it takes the place of the client's.

    Raises:
        AdapterError: a tensor is not finite; nothing is written then.
    """
    like = tensors.clients[0]
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        for name in settings_files(like.folder) if like.config is None else (CONFIG,):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(like.folder / name, fresh / name)
        if base:
            named = {"base_model_name_or_path": base, "revision": None}
            write_json(fresh / CONFIG, {**read_json(like.folder / CONFIG, MOST_BYTES), **named})
        for path in like.tensors.headers:
            _write_file(tensors, like.tensors, path, fresh / path.name)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_file(tensors: ByTensor, like: FileTensors, path: Path, out: Path) -> None:
    """Write a file with another's header, tensor after tensor."""
    header = like.headers[path]
    with open(path, "rb") as source, open(out, "wb") as made:
        made.write(source.read(like.start(path)))
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            tensor = tensors[name]
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{out.parent}: {name} would have NaN or infinity; nothing is written")
            made.write(as_bytes(tensor.contiguous()))
