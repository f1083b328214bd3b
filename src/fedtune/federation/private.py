"""What a client keeps to itself between its rounds: on its own disk, never sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fedtune.federation.blocks import Blocks, axis_of
from fedtune.io import write_bytes
from fedtune.lora.state import apart
from fedtune.tensors import tensor_header

_NAME = re.compile(r"round-(\d{6})-(\d)\.safetensors")
_BLOCKS = "blocks"  # in how many blocks a file's side adapters are
When = tuple[int, int]


class PrivateStore:
    """A folder with each client's kept tensors, by round and exchange.

    A continued run may step back to an earlier checkpoint, so a few rounds are kept and those that a new
    attempt has overtaken are dropped. Side adapters are the same on all clients, and on disk once; see `blocks`.

    Args:
        folder: where; None keeps nothing on disk and everything in memory.
        rounds: how many rounds back a run may be continued from.
    """

    def __init__(self, folder: Path | None, rounds: int = 2) -> None:
        self._folder = folder
        self._blocks = Blocks(folder / "shared") if folder else None
        self._rounds = rounds
        self._memory: dict[int, dict[When, dict[str, Tensor]]] = {}

    def _files(self, client: int) -> dict[When, Path]:
        if self._folder is None:
            return {}
        found = (self._folder / f"client-{client:06d}").glob("*.safetensors")
        named = ((_NAME.fullmatch(path.name), path) for path in found)
        return {(int(m[1]), int(m[2])): path for m, path in named if m}

    def load(self, client: int, before: When) -> dict[str, Tensor]:
        """Return what a client kept last before a round's exchange; nothing if it kept nothing.

        Raises:
            CorruptFileError: the file is damaged.
        """
        files = self._files(client)
        known = [when for when in (*files, *self._memory.get(client, ())) if when < before]
        if not known:
            return {}
        if max(known) not in files:
            return self._memory[client][max(known)]
        return self._read(files[max(known)])

    def _read(self, path: Path) -> dict[str, Tensor]:
        tensor_header(path)
        kept: dict[str, Tensor] = safetensors.torch.load_file(path)
        count = int(kept.pop(_BLOCKS, torch.tensor(0)))
        return {**kept, **self._blocks.load(path, count)} if self._blocks else kept

    def save(self, client: int, when: When, tensors: Mapping[str, Tensor]) -> None:
        """Keep a client's tensors of an exchange, and drop what no continuation needs."""
        if self._folder is None:
            self._memory.setdefault(client, {})[when] = dict(tensors)
            self._memory[client] = {w: t for w, t in self._memory[client].items() if w in self._needed(client, when)}
            return
        path = self._folder / f"client-{client:06d}" / f"round-{when[0]:06d}-{when[1]}.safetensors"
        self._write(path, tensors)
        needed = self._needed(client, when)
        for old, file in self._files(client).items():
            if old not in needed:
                file.unlink()
                if self._blocks:
                    self._blocks.drop(file)

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a client's file after the blocks it refers to, so that a whole file has all of them."""
        own = apart({n: t for n, t in tensors.items() if axis_of(n) is None})
        sides = {n: t for n, t in tensors.items() if axis_of(n) is not None}
        if self._blocks and sides:
            own[_BLOCKS] = torch.tensor(self._blocks.save(path, sides))
        write_bytes(path, safetensors.torch.save(own))

    def _needed(self, client: int, now: When) -> set[When]:
        """Return the exchanges to keep: the last rounds, and the newest before them."""
        known = sorted(w for w in (*self._files(client), *self._memory.get(client, ())) if w <= now)
        recent = [w for w in known if w[0] >= now[0] - self._rounds]
        older = [w for w in known if w not in recent]
        return {*recent, *older[-1:]}
