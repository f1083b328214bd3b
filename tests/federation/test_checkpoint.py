"""A checkpoint whose numbers are not those of its run is passed over, and the one before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedtune.federation import checkpoint
from fedtune.federation.checkpoint import Progress
from fedtune.lora.base_delta import Piece
from fedtune.lora.product import Product
from fedtune.lora.state import LoraModule
from fedtune.methods import ServerState
from fedtune.types import ResumeError, RoundRecord

Tensors = dict[str, torch.Tensor]
A = "base_model.model.q.lora_A.weight"


def _record(round_: int, status: str = "ok") -> RoundRecord:
    return RoundRecord(round_, status, 0.1, (0,), (), (), 1, 1)


def _state(value: float, round_: int) -> ServerState:
    module = LoraModule(torch.full((2, 3), value), torch.full((4, 2), value), 4.0)
    base = (Piece(1, {"q": Product(torch.ones(4, 5), torch.ones(5, 3))}),)
    return ServerState({"q": module}, round_, {"momentum": torch.ones(2)}, base)


START = _state(0.0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rounds, of which the last was skipped."""
    progress = Progress(START)
    for round_, status in enumerate(("ok", "ok", "skipped"), 1):
        state = _state(float(min(round_, 2)), min(round_, 2))
        timing = {"round": round_, "train_seconds": 1.0}
        progress = progress.after(state, _record(round_, status), int(status == "skipped"), timing)
        checkpoint.save(tmp_path, progress, "id", keep=2)
    return tmp_path


def test_a_whole_checkpoint_comes_back(folder: Path) -> None:
    progress, notes = checkpoint.newest(folder, START, "id")
    assert (notes, progress.round, progress.state.round, progress.skipped) == ((), 3, 2, 1)
    assert torch.equal(progress.state.adapter["q"].a, torch.full((2, 3), 2.0))


def _rewritten(folder: Path, change: Callable[[Tensors], Any], *, signed: bool = True) -> None:
    """Change the newest checkpoint's tensors, and the hash that its state has of them."""
    newest = folder / "checkpoints/round-000003"
    tensors = safetensors.torch.load_file(newest / "state.safetensors")
    change(tensors)
    raw = safetensors.torch.save(tensors)
    (newest / "state.safetensors").write_bytes(raw)
    if signed:
        _stated(folder, {"sha256": hashlib.sha256(raw).hexdigest()})


def _stated(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "checkpoints/round-000003/state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


DAMAGE: dict[str, Callable[[Tensors], Any]] = {
    "NaN": lambda t: t[A].fill_(torch.nan),
    "infinity": lambda t: t[A].fill_(torch.inf),
    "absurd": lambda t: t[A].fill_(1e30),
    "NaN in extra": lambda t: t["extra/momentum"].fill_(torch.nan),
    "NaN in the base": lambda t: t["base/1/left/q"].fill_(torch.nan),
    "dtype": lambda t: t.update({A: t[A].double()}),
    "whole numbers": lambda t: t.update({A: t[A].to(torch.int32)}),
    "rank": lambda t: t.update({A: t[A][:1].clone()}),
    "width": lambda t: t.update({A: torch.ones(2, 7)}),
    "axes": lambda t: t.update({A: torch.ones(2, 3, 1)}),
    "base that does not multiply": lambda t: t.update({"base/1/left/q": torch.ones(4, 6)}),
    "base of another model": lambda t: t.update({"base/1/left/q": torch.ones(9, 5)}),
    "a missing name": lambda t: t.pop(A),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_numbers_that_this_run_cannot_have_are_passed_over(folder: Path, damage: str) -> None:
    _rewritten(folder, DAMAGE[damage])
    progress, (note,) = checkpoint.newest(folder, START, "id")
    assert progress.round == 2
    assert torch.equal(progress.state.adapter["q"].a, torch.full((2, 3), 2.0))
    assert note.startswith("checkpoint round-000003")
    assert "kept as damaged-round-000003; going on from round 2" in note


def test_a_number_that_changed_on_the_disk_is_noticed(folder: Path) -> None:
    _rewritten(folder, lambda t: t[A].fill_(2.5), signed=False)
    progress, (note,) = checkpoint.newest(folder, START, "id")
    assert progress.round == 2
    assert "sha256" in note


@pytest.mark.parametrize(
    "change",
    [
        {"state_round": 3},
        {"state_round": 10**6},
        {"skipped": -(10**9)},
        {"skipped": 0},
        {"timing": {"train_seconds": 1.0, "round": 2}},
        {"timing": {"round": "x"}},
        {"timing": None},
        {"sha256": None},
        {"round": "3"},
        {"record": _record(3, "ok").as_json()},
    ],
    ids=str,
)
def test_a_state_that_its_rounds_do_not_make_is_passed_over(folder: Path, change: dict[str, Any]) -> None:
    _stated(folder, change)
    progress, notes = checkpoint.newest(folder, START, "id")
    assert (progress.round, progress.skipped, len(notes)) == (2, 0, 1)


def test_how_long_a_round_took_is_no_reason_not_to_go_on(folder: Path) -> None:
    _stated(folder, {"timing": {}})
    assert checkpoint.newest(folder, START, "id")[0].round == 3


def test_where_no_older_one_is_left_the_run_is_refused(folder: Path) -> None:
    other = {"q": replace(START.adapter["q"], a=torch.ones(2, 8))}
    with pytest.raises(ResumeError, match=r"lora_A\.weight is float32 \(2, 3\), this run has float32 \(2, 8\)"):
        checkpoint.newest(folder, ServerState(other), "id")
