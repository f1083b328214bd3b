"""Round-atomic checkpoints: a run killed at any instant continues as if nothing had happened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from fedtune.federation.faults import kill_point
from fedtune.io import (
    append_lines,
    read_json,
    read_lines,
    tensor_header,
    write_bytes,
    write_json,
    write_lines,
)
from fedtune.lora.base_delta import Piece
from fedtune.lora.product import Product
from fedtune.lora.state import to_tensors, with_tensors
from fedtune.methods.base import ServerState
from fedtune.types import CorruptFileError, FedtuneError, RoundRecord

STATE, TENSORS, ROUNDS = "state.json", "state.safetensors", "rounds.jsonl"
_EXTRA, _BASE = "extra/", "base/"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the server's state, all round records so far, and skipped rounds in a row."""

    state: ServerState
    records: tuple[RoundRecord, ...] = ()
    skipped: int = 0

    @property
    def round(self) -> int:
        """The last round that is over."""
        return len(self.records)


def _folder(run: Path, round_: int) -> Path:
    return run / "checkpoints" / f"round-{round_:06d}"


def _tensors(state: ServerState) -> dict[str, Tensor]:
    extra = {_EXTRA + name: t for name, t in state.extra.items()}
    base = {
        f"{_BASE}{piece.round}/{end}/{path}": getattr(product, end)
        for piece in state.base
        for path, product in piece.products.items()
        for end in ("left", "right")
    }
    return {name: t.contiguous() for name, t in {**to_tensors(state.adapter), **extra, **base}.items()}


def _state(tensors: Mapping[str, Tensor], start: ServerState, round_: int) -> ServerState:
    """Return the server's state from a checkpoint's tensors."""
    extra = {n.removeprefix(_EXTRA): t for n, t in tensors.items() if n.startswith(_EXTRA)}
    pieces: dict[int, dict[str, Product]] = {}
    for name in tensors:
        if name.startswith(_BASE):
            number, end, path = name.removeprefix(_BASE).split("/", 2)
            if end == "left":
                other = tensors[f"{_BASE}{number}/right/{path}"]
                pieces.setdefault(int(number), {})[path] = Product(tensors[name], other)
    own = {n: t for n, t in tensors.items() if not n.startswith((_EXTRA, _BASE))}
    base = tuple(Piece(number, pieces[number]) for number in sorted(pieces))
    return ServerState(with_tensors(start.adapter, own), round_, extra, base)


def save(run: Path, progress: Progress, run_id: str, keep: int) -> None:
    """Write a checkpoint after a round, then the round's line, then drop old checkpoints.

    The order makes every instant safe: the folder appears whole by one rename and holds the round's record,
    so a line that was not written yet can be written again.
    """
    target = _folder(run, progress.round)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    write_bytes(fresh / TENSORS, safetensors.torch.save(_tensors(progress.state)))
    kill_point(progress.round, "half")
    document = {
        "run_id": run_id,
        "round": progress.round,
        "state_round": progress.state.round,
        "skipped": progress.skipped,
        "record": progress.records[-1].as_json(),
    }
    write_json(fresh / STATE, document)
    if target.exists():
        shutil.rmtree(target)
    os.replace(fresh, target)
    kill_point(progress.round, "renamed")
    append_lines(run / ROUNDS, [progress.records[-1].as_json()])
    for old in sorted((run / "checkpoints").glob("round-*"))[:-keep]:
        shutil.rmtree(old)


def _read(folder: Path, run: Path, start: ServerState, run_id: str) -> Progress:
    """Read one checkpoint, or raise if any part of it is not whole."""
    document = read_json(folder / STATE)
    if document["run_id"] != run_id:
        raise CorruptFileError(f"{folder}: belongs to run {document['run_id']}, this is {run_id}")
    tensor_header(folder / TENSORS)
    tensors = safetensors.torch.load_file(folder / TENSORS)
    state = _state(tensors, start, int(document["state_round"]))
    round_ = int(document["round"])
    records = [RoundRecord.from_json(line) for line in read_lines(run / ROUNDS, torn_tail=True)][: round_ - 1]
    records.append(RoundRecord.from_json(document["record"]))
    if [r.round for r in records] != list(range(1, round_ + 1)):
        raise CorruptFileError(f"{run / ROUNDS}: has rounds {[r.round for r in records]}, checkpoint is {round_}")
    return Progress(state, tuple(records), document["skipped"])


def newest(run: Path, start: ServerState, run_id: str) -> tuple[Progress, tuple[str, ...]]:
    """Return the newest checkpoint that is whole, else the start, and what was wrong with the ones passed over."""
    problems: list[str] = []
    for folder in sorted((run / "checkpoints").glob("round-*"), reverse=True):
        try:
            progress = _read(folder, run, start, run_id)
        except (FedtuneError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as err:
            problems.append(f"{folder.name}: {err}")
            continue
        write_lines(run / ROUNDS, [r.as_json() for r in progress.records])
        return progress, tuple(problems)
    (run / ROUNDS).unlink(missing_ok=True)
    return Progress(start), tuple(problems)
