"""Finite but absurd numbers: a server half names the client or returns a finite model, and raises nothing else."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import Config
from fedtune.lora.base_delta import effective
from fedtune.lora.state import AdapterState, LoraModule, to_tensors
from fedtune.methods import METHODS, Algorithm, ClientUpdate, RoundContext, ServerState, create, sound
from fedtune.methods.traits import magnitudes
from fedtune.types import UpdateError

CLIENTS, BAD = 5, 3
VALUES = [0.0, 1e-38, 1e-8, 1e4, -1e4, 1e6, -1e6, 1e9, 1e20, -1e20, 3e38, -3e38]
EXACT_DORA = [name for name in METHODS if magnitudes(METHODS[name]) == "exact"]


def layout(dora: bool) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.rand(6, generator=generator) + 1 if dora else None
    draw = torch.randn(4, 7, generator=generator), torch.randn(6, 4, generator=generator)
    return {f"l{i}.q": LoraModule(draw[0] + i, draw[1], 8.0, magnitude=magnitude) for i in range(2)}


def payload(made: Algorithm, state: ServerState, client: int, round_: int) -> dict[str, Tensor]:
    """Return what an honest client may send: what is expected, and a step."""
    generator = torch.Generator().manual_seed(100 * round_ + client)
    found = {}
    for name, tensor in made.upload(state, client, round_).tensors.items():
        if not tensor.is_floating_point():
            found[name] = tensor
            continue
        step = 0.05 * torch.randn(tensor.shape, generator=generator)
        if name.startswith("fedask/Y"):  # of no more directions than the rank
            found[name] = step[:, :1] * step[:1]
            continue
        found[name] = tensor + (step.abs() if "magnitude" in name else step)
    return found


def spoiled(tensors: dict[str, Tensor], value: float, where: int) -> dict[str, Tensor]:
    """Put a value everywhere, into one tensor, or into one number."""
    names = [n for n, t in tensors.items() if t.is_floating_point()]
    chosen = names if where == 0 else [names[where % len(names)]]
    changed = dict(tensors)
    for name in chosen:
        changed[name] = tensors[name].clone()
        changed[name].view(-1)[: None if where < 6 else 1] = value
    return changed


def finite(state: ServerState) -> bool:
    whole = [t for p in effective(state.adapter, state.base).values() for t in (p.left, p.right, p.left @ p.right)]
    kept = [t for t in state.extra.values() if t.is_floating_point()]
    magnitudes = [m.magnitude for m in state.adapter.values() if m.magnitude is not None]
    return all(bool(torch.isfinite(t).all()) for t in [*whole, *kept, *magnitudes])


def advanced(made: Algorithm, state: ServerState, round_: int, bad: tuple[float, int] | None) -> ServerState:
    """Make one round as the loop does: who is named by an error is left out of the round."""
    members = list(range(CLIENTS))
    while state.round < round_:
        sent = [ClientUpdate(c, payload(made, state, c, round_), 10.0) for c in members]
        if bad is not None and BAD in members:
            place = members.index(BAD)
            sent[place] = replace(sent[place], tensors=spoiled(dict(sent[place].tensors), *bad))
            if made.config.lora.dora and made.upload(state, BAD, round_, 2).problem(sent[place].tensors):
                members.remove(BAD)  # such a reply is rejected as it comes
                sent.pop(place)
        try:
            state = made.server_step(sent, state, RoundContext(round_))
        except UpdateError as err:
            members.remove(err.client)
            state = made.server_step([u for u in sent if u.client != err.client], state, RoundContext(round_))
    assert set(members) >= set(range(CLIENTS)) - {BAD}
    return state


def check(config: dict[str, Any], value: float, where: int, when: int) -> None:
    made = create(Config.model_validate({"domain": "finance", "lora": {"r": 4, "alpha": 8.0}, **config}))
    state = made.initial(layout(made.config.lora.dora))
    for round_ in range(1, 4):
        if made.linear and abs(value) > sound.LARGEST:
            return  # such a reply is rejected as it comes, before it is added to a sum
        state = advanced(made, state, round_, (value, where) if round_ == when else None)
        assert finite(state), round_


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=12)
@given(st.sampled_from(VALUES), st.integers(0, 9), st.integers(1, 3))
def test_one_client_can_neither_crash_a_method_nor_make_its_model_infinite(
    name: str, value: float, where: int, when: int
) -> None:
    check({"method": {"name": name}, "federation": {"clients": CLIENTS}}, value, where, when)


@pytest.mark.parametrize("name", EXACT_DORA)
@settings(deadline=None, max_examples=12)
@given(st.sampled_from([*VALUES, -100.0]), st.integers(0, 9), st.integers(1, 3))
def test_nor_with_magnitudes(name: str, value: float, where: int, when: int) -> None:
    tree = {"method": {"name": name}, "federation": {"clients": CLIENTS}, "lora": {"r": 4, "alpha": 8.0, "dora": True}}
    check(tree, value, where, when)


@pytest.mark.parametrize("rule", ["krum", "multi-krum", "geometric-median", "trimmed", "foolsgold", "dnc"])
@settings(deadline=None, max_examples=12)
@given(st.sampled_from(VALUES), st.integers(0, 9))
def test_nor_a_rule(rule: str, value: float, where: int) -> None:
    tree = {"method": {"name": "flexlora"}, "federation": {"clients": 6}, "robust": {"rule": rule}}
    made = create(Config.model_validate({"domain": "finance", "lora": {"r": 4, "alpha": 8.0}, **tree}))
    state = made.initial(layout(False))
    sent = [ClientUpdate(c, payload(made, state, c, 1), 10.0) for c in range(6)]
    sent[BAD] = replace(sent[BAD], tensors=spoiled(dict(sent[BAD].tensors), value, where))
    try:
        after = made.server_step(sent, state, RoundContext(1))
    except UpdateError as err:
        after = made.server_step([u for u in sent if u.client != err.client], state, RoundContext(1))
        assert {err.client} == {BAD}  # noqa: PT017
    assert finite(after)


@pytest.mark.parametrize("name", ["fedit", *EXACT_DORA])
@pytest.mark.parametrize("factor", [-100.0, -1.0, 0.0, 1e-9, 0.49, 2.01, 1e4, float("nan"), float("inf")])
def test_a_magnitude_moves_by_no_more_than_a_factor_of_two_in_a_round(name: str, factor: float) -> None:
    tree = {"domain": "finance", "method": {"name": name}, "lora": {"r": 4, "alpha": 8.0, "dora": True}}
    made = create(Config.model_validate(tree))
    state = made.initial(layout(True))
    sent = payload(made, state, BAD, 1)
    assert not made.upload(state, BAD, 1, 2).problem(sent)
    last = [n for n in sent if "magnitude" in n][-1]
    for inside in (0.5, 2.0):
        sent[last] = to_tensors(state.adapter)[last].clone() * torch.tensor([1.0, 1, 1, 1, 1, inside])
        assert not made.upload(state, BAD, 1, 2).problem(sent)
    sent[last][5] *= factor / 2
    assert re.match(
        r"l1\.q: row 5 has a magnitude of .*; from .* to .* is taken", made.upload(state, BAD, 1, 2).problem(sent)
    )
