"""Folders of plain tensors (IA3's vectors, whole models) aggregated one tensor at a time: no client is held whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """What a method's server half makes of the tensors of clients' folders, each when it is asked for.

    All have the same tensors; the method is one that is defined on them whatever they stand for.
    """

    method: Method
    clients: Sequence[FolderPlain]
    examples: Sequence[float]
    start: FolderPlain
    round: int

    def __getitem__(self, name: str) -> Tensor:
        before = ServerState(self.start.only(name), self.round - 1)
        after, _ = aggregation.aggregate(self.method, [c.only(name) for c in self.clients], self.examples, before)
        return to_tensors(after.adapter)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.start.tensors)

    def __len__(self) -> int:
        return len(self.start.tensors)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise AdapterError where one of some tensors has a number that is none."""
    if wrong := next((name for name, t in tensors.items() if not bool(torch.isfinite(t).all())), None):
        raise AdapterError(f"{where}: {wrong} would have NaN or infinity; nothing is written")


def renamed(adapter: Path, base: str | None) -> dict[str, Any]:
    """Return the settings of an adapter's folder, with another base model's name if one is given."""
    named = {"base_model_name_or_path": base, "revision": None} if base else {}
    return {**read_json(adapter / CONFIG, MOST_BYTES), **named}


def write(tensors: ByTensor, out: Path, base: str | None = None) -> None:
    """Write a folder with the files of the first client and other tensors; it appears whole.

    A base model's name given here takes the place of the client's, in an adapter's settings.

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
            write_json(fresh / CONFIG, renamed(like.folder, base))
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
            check_finite({name: tensor}, str(out.parent))
            made.write(as_bytes(tensor.contiguous()))
