"""The wrappers' list: its order, what a run's settings ask for, and the page on adding one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Config
from fedtune.lora.state import to_tensors
from fedtune.methods import METHODS, Algorithm, ServerState, create
from fedtune.methods.wrappers import WRAPPERS, asked
from tests.clients import fit_by
from tests.methods.test_around import Quadratic
from tests.methods.test_methods import START

PAGE = Path(__file__).parents[2] / "docs/add-a-wrapper.md"


def config(**changes: Any) -> Config:
    return Config.model_validate({"domain": "finance", **changes})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"drift": {"proximal_mu": 0.1}, "server": {"optimizer": "fedadam"}}, ["server", "fedprox"]),
        ({"drift": {"scaffold": True}, "attack": {"kind": "boost", "clients": [1]}}, ["attack", "scaffold"]),
        ({"lora": {"dora": True}, "robust": {"rule": "krum"}}, ["robust", "dora"]),
    ],
)
def test_settings_ask_for_wrappers_from_the_outside_in(changes: dict[str, Any], names: list[str]) -> None:
    assert [w.name for w in asked(config(**changes), METHODS["fedit"])] == names


def test_names_are_their_own_and_no_methods_tensors_begin_with_them() -> None:
    names = [w.name for w in WRAPPERS.values()]
    assert len(set(names)) == len(names)
    assert not set(names) & set(METHODS)


def test_a_checkpoints_names_come_back_to_their_owners() -> None:
    state = ServerState(START, 3, {"fedalt/shares": torch.ones(2)}, memory={"server": {"m/x": torch.zeros(1)}})
    carried = state.carried()
    assert set(carried) == {"fedalt/shares", "server/m/x"}
    again = ServerState(START, 3).carrying(carried, WRAPPERS)
    assert dict(again.extra) == dict(state.extra)
    assert {o: dict(own) for o, own in again.memory.items()} == {o: dict(own) for o, own in state.memory.items()}


def test_the_wrapper_of_the_page_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    scope: dict[str, Any] = {"__name__": "page"}
    exec(blocks[0], scope)
    plain: Algorithm = create(config())
    whole = fit_by(plain, Quadratic(0, {}), plain.view(ServerState(START), 0)).payload
    monkeypatch.setitem(WRAPPERS.own, "shrinks", scope["Shrinks"])
    algorithm = create(config(wrappers={"shrinks": {"share": 0.5}}))
    half = fit_by(algorithm, Quadratic(0, {}), algorithm.view(ServerState(START), 0)).payload
    start = to_tensors(START)
    assert all(torch.allclose(half[n], (whole[n] + start[n]) / 2) for n in start)
    assert any(not torch.equal(whole[n], start[n]) for n in start)


def test_the_order_is_shown_with_the_settings() -> None:
    from typer.testing import CliRunner

    from fedtune.cli import app

    words = ["run", "finance", "--print-config", "-s", "drift.proximal_mu=0.1", "-s", "server.optimizer=fedadam"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0
    assert "# wrappers, from the outside in: server, fedprox" in shown.stdout
