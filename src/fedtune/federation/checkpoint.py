"""Round-atomic checkpoints: a run killed at any instant continues as if nothing had happened."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import safetensors.torch
from torch import Tensor

from fedtune.federation.faults import kill_point
from fedtune.federation.guard import state_problem
from fedtune.io import append_lines, file_sha256, read_json, read_lines, reading, write_bytes, write_json, write_lines
from fedtune.lora.base_delta import Piece
from fedtune.lora.product import Product
from fedtune.lora.state import apart, to_tensors, with_tensors
from fedtune.methods import sound
from fedtune.methods.state import ServerState
from fedtune.methods.wrappers import WRAPPERS
from fedtune.tensors import tensor_header
from fedtune.types import CorruptFileError, ResumeError, RoundRecord, last_line

STATE, TENSORS, ROUNDS, TIMINGS = "state.json", "state.safetensors", "rounds.jsonl", "timings.jsonl"
_EXTRA, _BASE = "extra/", "base/"
_NAME = re.compile(r"round-(\d{6,})")


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        state: the server's.
        records: of all rounds so far; one list that grows, so that a round costs the same however many came before it.
        skipped: rounds in a row in which clients were asked and too few were good.
        timing: of the last round.
    """

    state: ServerState
    records: list[RoundRecord] = field(default_factory=list)
    skipped: int = 0
    timing: Mapping[str, float] = field(default_factory=dict)

    @property
    def round(self) -> int:
        """The last round that is over."""
        return len(self.records)

    def after(self, state: ServerState, record: RoundRecord, skipped: int, timing: Mapping[str, float]) -> Progress:
        """Return where the run stands after one more round; the list of records is the same one, grown."""
        self.records.append(record)
        return Progress(state, self.records, skipped, timing)


def _folder(run: Path, round_: int) -> Path:
    return run / "checkpoints" / f"round-{round_:06d}"


def folders(run: Path) -> dict[int, Path]:
    """Return the folders of checkpoints by round, in order; what else lies there is nobody's business."""
    found = ((_NAME.fullmatch(p.name), p) for p in (run / "checkpoints").glob("round-*") if p.is_dir())
    return dict(sorted((int(m[1]), p) for m, p in found if m))


def _tensors(state: ServerState) -> dict[str, Tensor]:
    extra = {_EXTRA + name: t for name, t in state.carried().items()}
    base = {
        f"{_BASE}{piece.round}/{end}/{path}": getattr(product, end)
        for piece in state.base
        for path, product in piece.products.items()
        for end in ("left", "right")
    }
    return apart({**to_tensors(state.adapter), **extra, **base})


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
    return ServerState(with_tensors(start.adapter, own), round_, base=base).carrying(extra, WRAPPERS)


def rounds_of(run: Path) -> list[RoundRecord]:
    """Return the rounds of a run on disk, however it ended."""
    with reading(run / ROUNDS):
        return [RoundRecord.from_json(line) for line in read_lines(run / ROUNDS, torn_tail=True)]


def together(runs: Sequence[Sequence[RoundRecord]]) -> list[RoundRecord]:
    """Return the rounds of clients that took part alone as rounds of all of them."""
    rounds: dict[int, list[RoundRecord]] = {}
    for record in chain.from_iterable(runs):
        rounds.setdefault(record.round, []).append(record)
    return [_joined(rounds[number]) for number in sorted(rounds)]


def _joined(records: Sequence[RoundRecord]) -> RoundRecord:
    statuses = [r.status for r in records]
    return replace(
        records[0],
        status=next((s for s in ("ok", "skipped") if s in statuses), "idle"),
        cohort=tuple(c for r in records for c in r.cohort),
        clients=tuple(c for r in records for c in r.clients),
        rejected=tuple(x for r in records for x in r.rejected),
        bytes_down=sum(r.bytes_down for r in records),
        bytes_up=sum(r.bytes_up for r in records),
        notes=tuple(n for r in records for n in r.notes),
    )


def save(run: Path, progress: Progress, run_id: str, keep: int) -> None:
    """Write a checkpoint after a round, then the lines of the round and its timing, then drop old checkpoints.

    The order makes every instant safe: the folder appears whole by one rename and holds the round's record and
    timing, so a line that was not written yet can be written again.
    """
    target = _folder(run, progress.round)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    write_bytes(fresh / TENSORS, tensors := safetensors.torch.save(_tensors(progress.state)))
    kill_point(progress.round, "half")
    document = {
        "run_id": run_id,
        "round": progress.round,
        "sha256": hashlib.sha256(tensors).hexdigest(),
        "state_round": progress.state.round,
        "skipped": progress.skipped,
        "record": progress.records[-1].as_json(),
        "timing": dict(progress.timing),
    }
    write_json(fresh / STATE, document)
    if target.exists():
        shutil.rmtree(target)
    os.replace(fresh, target)
    kill_point(progress.round, "renamed")
    append_lines(run / ROUNDS, [progress.records[-1].as_json()])
    append_lines(run / TIMINGS, [dict(progress.timing)] if progress.timing else [])
    for old in list(folders(run).values())[:-keep]:
        shutil.rmtree(old)


def _unfit(state: ServerState, start: ServerState) -> str:
    """Say what makes a checkpoint's state one that this run cannot have reached, or return an empty text."""
    wanted, had = to_tensors(start.adapter), to_tensors(state.adapter)
    for name, tensor in had.items():
        if (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype):
            kinds = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (tensor, wanted[name])]
            return f"{name} is {kinds[0]}, this run has {kinds[1]}"
    for piece in state.base:
        for path, p in piece.products.items():
            ends = (p.left.shape[0], p.right.shape[1])
            if path not in start.adapter or p.left.shape[1:] != p.right.shape[:1] or ends != _ends(start, path):
                return f"the change of the base model at {path} is none of this model"
    # every piece is the newest of some state; the rest was looked at as part of the whole
    states = (state, *(ServerState({}, base=(piece,)) for piece in state.base[:-1]))
    return next((problem for s in states if (problem := state_problem(s, sound.LARGEST))), "")


def _ends(start: ServerState, path: str) -> tuple[int, int]:
    return start.adapter[path].b.shape[0], start.adapter[path].a.shape[1]


def _stands(records: Sequence[RoundRecord]) -> tuple[int, int]:
    """Return the last round that changed the model, and how many were skipped since."""
    last = max((r.round for r in records if r.status == "ok"), default=0)
    return last, sum(r.status == "skipped" for r in records[last:])


def _read(folder: Path, run: Path, start: ServerState, run_id: str) -> Progress:
    """Read one checkpoint, or raise if any part of it is not whole, or not of this run."""
    document = read_json(folder / STATE)
    if document["run_id"] != run_id:
        raise CorruptFileError(f"{folder}: belongs to run {document['run_id']}, this is {run_id}")
    tensor_header(folder / TENSORS)
    if document["sha256"] != file_sha256(folder / TENSORS):
        raise CorruptFileError(f"{folder / TENSORS}: is not the file that was saved (sha256 differs)")
    tensors = safetensors.torch.load_file(folder / TENSORS)
    state, round_ = _state(tensors, start, document["state_round"]), document["round"]
    if folder.name != _folder(run, round_).name:
        raise CorruptFileError(f"{folder}: is of round {round_}")
    records = [*rounds_of(run)[: round_ - 1], RoundRecord.from_json(document["record"])]
    if [r.round for r in records] != list(range(1, round_ + 1)):
        raise CorruptFileError(f"{run / ROUNDS}: has rounds {[r.round for r in records]}, checkpoint is {round_}")
    stands = (document["state_round"], document["skipped"])
    if stands != _stands(records):
        raise CorruptFileError(f"{folder / STATE}: stands at {stands}, its rounds make {_stands(records)}")
    if problem := _unfit(state, start):
        raise CorruptFileError(f"{folder / TENSORS}: {problem}")
    timing = {str(k): float(v) for k, v in document["timing"].items()}
    if timing.get("round", round_) != round_:
        raise CorruptFileError(f"{folder / STATE}: has the timing of round {timing['round']:g}")
    return Progress(state, records, document["skipped"], timing if "round" in timing else {})


def _put_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither read nor dropped; return its new place."""
    names = (f"damaged-{folder.name}" + (f"-{i}" if i else "") for i in range(10_000))
    place = next(folder.with_name(n) for n in names if not folder.with_name(n).exists())
    os.replace(folder, place)
    return place


def _trimmed(run: Path, progress: Progress) -> None:
    """Cut the run's lines off after a round: each round has its own once, whenever the process before died."""
    write_lines(run / ROUNDS, [r.as_json() for r in progress.records])
    known: dict[int, Mapping[str, float]] = {}
    # how long rounds took is no reason not to go on
    with contextlib.suppress(CorruptFileError), reading(run / TIMINGS):
        known = {int(line["round"]): line for line in read_lines(run / TIMINGS, torn_tail=True)}
    if progress.timing:
        known[int(progress.timing["round"])] = progress.timing
    write_lines(run / TIMINGS, [known[r] for r in sorted(known) if r <= progress.round])


def newest(run: Path, start: ServerState, run_id: str) -> tuple[Progress, tuple[str, ...]]:
    """Return the newest checkpoint that is whole, or the start of a run that has none yet.

    Newer ones that are damaged are put aside under another name.

    Returns:
        Where the run stands, and what was wrong with the checkpoints passed over.

    Raises:
        ResumeError: the run has rounds, and no checkpoint of them is whole. Nothing on disk is changed.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(folders(run).values()):
        try:
            progress = _read(folder, run, start, run_id)
        except Exception as err:  # whatever a damaged file makes a reader raise
            damaged[folder] = f"{folder.name}: {type(err).__name__}: {last_line(str(err))}"
            continue
        aside = [
            f"{why}; kept as {_put_aside(f).name}; going on from round {progress.round}" for f, why in damaged.items()
        ]
        _trimmed(run, progress)
        return progress, tuple(f"checkpoint {note}" for note in aside)
    if damaged or (run / ROUNDS).exists():
        raise ResumeError(_nothing_whole(run, list(damaged.values())))
    (run / TIMINGS).unlink(missing_ok=True)
    return Progress(start), ()


def _nothing_whole(run: Path, why: Sequence[str]) -> str:
    listed = "\n".join(f"  {line}" for line in why) or "  there is none"
    return (
        f"{run} has rounds behind it, but none of its checkpoints can be read:\n{listed}\n"
        f"Put a whole one back into {run / 'checkpoints'}, or start a new run with another --out."
    )
