"""Layers narrower than the rank: every factor keeps the rank's shape, and the model is what it is of a wide layer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.lora.base_delta import effective
from fedtune.lora.state import PREFIX, AdapterState, LoraModule, to_tensors, with_tensors
from fedtune.methods import METHODS, Algorithm, RoundContext, ServerState, create
from fedtune.methods.aggregation import aggregate
from fedtune.methods.fed_sb import FedSB
from fedtune.methods.state import ClientUpdate
from tests.clients import begun_by, fit_by
from tests.faults.hostile import Toy
from tests.methods.test_methods import GLOBAL, make, mean, same

RANK = 6
SHAPES = {"flat.q": (3, 10), "thin.q": (10, 4), "wide.q": (12, 10)}
A, B = ".lora_A.weight", ".lora_B.weight"


def adapter(seed: int, rank: int = RANK) -> AdapterState:
    """Return layers with fewer outputs, and fewer inputs, than the rank, and one with more of both."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {p: LoraModule(draw(rank, inn), draw(out, rank), 2.0 * rank) for p, (out, inn) in SHAPES.items()}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize("round_", [1, 2])
@pytest.mark.parametrize("name", GLOBAL)
def test_what_all_clients_send_is_the_model(name: str, round_: int) -> None:
    method, start = make(name, **({"tau": 1 - 1e-9} if name == "florist" else {})), adapter(0)
    common = {n: t for n, t in to_tensors(start).items() if not method.trainable(round_, n)}
    one = with_tensors(start, {**to_tensors(adapter(1)), **common})
    after = aggregate(method, [one, one], [1.0, 3.0], ServerState(start, round_ - 1))[0]
    assert same({p: w.dense() for p, w in effective(after.adapter, after.base).items()}, mean([one], [1.0]))
    assert shapes(to_tensors(after.adapter)) == shapes(to_tensors(start))


@pytest.mark.parametrize("name", METHODS)
def test_rounds_take_and_leave_factors_of_the_rank(name: str) -> None:
    config = Config.model_validate({"domain": "finance", "method": {"name": name}, "lora": {"r": RANK}})
    made = create(config)
    start = {p: replace(m, a=m.a.float(), b=torch.zeros_like(m.b).float()) for p, m in adapter(0).items()}
    state, kept = made.initial(start), {0: {}, 1: {}}
    for round_ in (1, 2, 3):
        state = _round(made, start, state, kept, round_)
        assert shapes(to_tensors(state.adapter)) == shapes(to_tensors(start))


def _round(made: Algorithm, start: AdapterState, state: ServerState, kept: dict[int, Any], round_: int) -> ServerState:
    """Make one round as a run does, with what the screening demands of the shapes that are sent."""
    phase = 0
    while state.round < round_:
        sent, phase = [], phase + 1
        for client in kept:
            fitted = fit_by(made, Toy(client, round_, phase, start, kept[client]), made.view(state, client))
            kept[client], upload = fitted.kept, made.upload(state, client, round_, Toy.steps)
            if not upload.ragged:
                assert shapes(fitted.payload) == shapes(upload.tensors)
            assert not upload.problem(fitted.payload)
            sent.append(ClientUpdate(client, fitted.payload, 1.0))
        state = made.server_step(sent, state, RoundContext(round_))
    return state


class Descent(Toy):
    """A client with the linear loss <G, s B R A>, or with factors alone <G, s B A>: its gradient is the same all the way."""

    def train(self, start: Any, names: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
        now = {n: t.clone() for n, t in start.items()}
        for name in names:
            path = name.removeprefix(PREFIX).removesuffix(".lora_R.weight")
            a, b = start[PREFIX + path + A], start[PREFIX + path + B]
            now[name] -= self.layout[path].scale * b.T @ slope(path) @ a.T
        return now

    def gradients(self, at: Any, names: Any) -> dict[str, Tensor]:
        found = {}
        for name in names:
            path, scale = name.removeprefix(PREFIX).rsplit(".lora_", 1)[0], 2.0
            a, b = at[PREFIX + path + A], at[PREFIX + path + B]
            found[name] = scale * (slope(path) @ a.T if name.endswith(B) else b.T @ slope(path))
        return found


def slope(path: str) -> Tensor:
    """Return the gradient with respect to a layer's weight."""
    return torch.randn(SHAPES[path], generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_fed_sb_trains_a_layer_narrower_than_the_rank_as_it_does_at_the_layers_own_rank() -> None:
    """The gradient of such a layer has no more directions than the layer has rows or columns."""
    found = {}
    for rank in (3, 4, RANK):
        method, start = cast(FedSB, make("fed_sb")), adapter(0, rank)
        state, kept = ServerState(start), {}
        for round_ in (1, 2):
            local = cast(Any, Descent)(0, round_, 1, start, kept)
            fitted = fit_by(method, local, begun_by(method, start, method.view(state, 0), kept, round_))
            kept = fitted.kept
            expected = method.upload(state, 0, round_).tensors
            assert shapes(fitted.payload) == shapes(expected)
            state = method.server_step([ClientUpdate(0, fitted.payload, 1.0)], state, RoundContext(round_))
        found[rank] = {p: m.scale * m.b @ m.a for p, m in state.adapter.items()}
    for path, rank in (("flat.q", 3), ("thin.q", 4)):
        assert found[rank][path].norm() > 1
        assert torch.allclose(found[RANK][path], found[rank][path], atol=1e-8)
