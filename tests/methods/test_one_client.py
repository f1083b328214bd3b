"""How much of the model one accepted reply can take in methods that weigh by norms, sketch, or keep r directions."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.lora.base_delta import effective
from fedtune.lora.state import AdapterState, LoraModule, to_tensors, with_tensors
from fedtune.methods import Algorithm, ClientUpdate, RoundContext, ServerState, create, sound
from fedtune.methods.fed_sb import FedSB
from fedtune.methods.fedask import FedASK
from fedtune.methods.hetlora import HetLoRA
from fedtune.types import UpdateError
from tests.methods.test_methods import make

CLIENTS, BAD, RANK, OUT, IN = 8, 3, 2, 40, 30


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(seed: int, size: float = 1.0) -> AdapterState:
    return {
        f"l{i}.q": LoraModule(drawn(seed + i, RANK, IN), size * drawn(90 + seed + i, OUT, RANK), 4.0) for i in (0, 1)
    }


def algorithm(name: str, clip: str = "none", **settings: Any) -> Algorithm:
    tree = {"domain": "finance", "federation": {"clients": CLIENTS}, "lora": {"r": RANK, "alpha": 4.0}}
    robust = {"clip_norm": clip}
    return create(Config.model_validate({**tree, "method": {"name": name, **settings}, "robust": robust}))


def model(state: ServerState) -> Tensor:
    return torch.cat([w.dense().double().flatten() for w in effective(state.adapter, state.base).values()])


def left(before: Tensor, after: Tensor) -> float:
    """Return which share of the earlier model is still in the later one."""
    return float((before @ after) / (before @ before))


def honest(state: ServerState, client: int, step: float = 0.02) -> ClientUpdate:
    near = {n: t + step * drawn(1000 + client, *t.shape).to(t.dtype) for n, t in to_tensors(state.adapter).items()}
    return ClientUpdate(client, near, 10.0)


def test_outliers_count_as_twice_the_median() -> None:
    assert sound.capped([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert sound.capped([1.0, 2.0, 3.0, 1e9, 1.5]) == [1.0, 2.0, 3.0, 4.0, 1.5]
    assert sound.capped([0.0, 0.0, 5.0]) == [0.0, 0.0, 0.0]
    assert sound.capped([7.0]) == [7.0]


@pytest.mark.parametrize("size", [10.0, 1e4])
def test_no_client_of_hetlora_weighs_more_than_twice_the_median(size: float) -> None:
    method = cast(HetLoRA, make("hetlora"))
    own = [adapter(s)["l0.q"] for s in range(CLIENTS)]
    own[BAD] = replace(own[BAD], b=own[BAD].b * size)
    shares = method.shares(own, [10.0] * CLIENTS, RANK)[:, 0]
    share = float(shares[BAD] / shares.sum())
    assert 1 / CLIENTS < share < 2.5 / CLIENTS
    usual = method.shares([m for c, m in enumerate(own) if c != BAD], [10.0] * (CLIENTS - 1), RANK)[:, 0]
    assert torch.allclose(torch.cat([shares[:BAD], shares[BAD + 1 :]]), usual)


def gradients(method: FedSB, state: ServerState, gradient: Tensor) -> dict[str, Tensor]:
    """Return the sketches of a gradient that all layers have."""
    sent = {}
    for name, like in method.upload(state, 0, 1).tensors.items():
        probe = method._probe(state.adapter, int(name.rsplit(".", 1)[1]))
        path = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        sent[name] = gradient @ probe[path].a.T if ".lora_B" in name else probe[path].b.T @ gradient
        assert sent[name].shape == like.shape
    return sent


@pytest.mark.parametrize("which", [".lora_A", ".lora_B", ".lora_"])
def test_the_bases_of_fed_sb_are_those_of_the_many(which: str) -> None:
    method, start = cast(FedSB, make("fed_sb")), ServerState(adapter(0))
    common = drawn(1, OUT, RANK) @ drawn(2, RANK, IN)
    sent = [ClientUpdate(c, gradients(method, start, common + 0.05 * drawn(c, OUT, IN)), 10.0) for c in range(CLIENTS)]
    usual = method.server_step(sent, start, RoundContext(1))
    large = {n: 1e4 * drawn(7, *t.shape) if which in n else t for n, t in sent[BAD].tensors.items()}
    found = method.server_step(
        [*sent[:BAD], replace(sent[BAD], tensors=large), *sent[BAD + 1 :]], start, RoundContext(1)
    )
    for path, module in found.adapter.items():
        overlap = (module.a @ usual.adapter[path].a.T).square().sum() / RANK
        assert float(overlap) > 0.8
    # who is alike is as before, bit for bit: nothing was scaled
    assert torch.equal(
        usual.adapter["l0.q"].a,
        method.server_step([replace(u, tensors=dict(u.tensors)) for u in sent], start, RoundContext(1))
        .adapter["l0.q"]
        .a,
    )


def _sketches(method: FedASK, updates: list[AdapterState], width: int) -> list[ClientUpdate]:
    return [ClientUpdate(c, method.first(a, dict.fromkeys(a, width), 1), 10.0) for c, a in enumerate(updates)]


def _with_a_large_sketch(start: ServerState, chosen: int, step: float, size: float, noise: float) -> ServerState:
    """Return FedASK's state after a round in which one client's first sketch has nothing in common with the others'."""
    method = cast(FedASK, algorithm("fedask", width=chosen).method)
    width = method.sketch_width(OUT, IN, RANK)
    own = [with_tensors(start.adapter, honest(start, c, step).tensors) for c in range(CLIENTS)]
    first = _sketches(method, own, width)
    # of the rank that a client has, but for what rounding is allowed to add; 0 for an honest one
    odd, more = drawn(5, OUT, RANK) @ drawn(6, RANK, width), drawn(7, OUT, width)
    sent = size * (odd / odd.norm() + noise * more / more.norm())
    if size:
        first[BAD] = replace(first[BAD], tensors={n: sent.float() for n in first[BAD].tensors})
    middle = method.server_step(first, start, RoundContext(1))
    bases = {n.removeprefix("fedask/Q/"): t for n, t in middle.extra.items()}
    second = [ClientUpdate(c, method.second(a, bases), 10.0) for c, a in enumerate(own)]
    return method.server_step(second, middle, RoundContext(1))


def _single(size: float) -> ServerState:
    return ServerState({p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in adapter(0, size).items()})


@pytest.mark.parametrize("size", [1e4, 9e5])
@pytest.mark.parametrize("noise", [0.0, 0.99e-3])
def test_a_large_sketch_of_fedask_leaves_the_others_their_directions(size: float, noise: float) -> None:
    """At a width that has no room for both it would be all of the basis, and is scaled down."""
    start = _single(1.0)
    assert left(model(start), model(_with_a_large_sketch(start, RANK, 0.02, size, noise))) > 0.5


@pytest.mark.parametrize("step", [0.02, 1e-5])
@pytest.mark.parametrize("noise", [0.0, 0.99e-3])
@pytest.mark.parametrize("size", [1.0, 9000.0])
def test_where_there_is_room_a_large_sketch_of_fedask_takes_nothing(size: float, noise: float, step: float) -> None:
    """However little the honest ones differ: their sum would have no digits left beside 9,000."""
    start = _single(0.01)
    usual = model(_with_a_large_sketch(start, 0, step, 0.0, 0.0))
    off = model(_with_a_large_sketch(start, 0, step, size, noise)) - usual
    # the one client's own directions are missing, an eighth of what it moved
    own = honest(start, BAD, step).tensors
    moved = model(ServerState(with_tensors(start.adapter, own))) - model(start)
    assert float(off.norm()) < 0.2 * float(moved.norm()) + 1e-6 * float(usual.norm())


def test_a_width_of_as_many_columns_as_fedask_needs_is_the_default_bit_for_bit() -> None:
    start, found = ServerState(adapter(0)), []
    own = [with_tensors(start.adapter, honest(start, c).tensors) for c in range(CLIENTS)]
    own[BAD] = {p: replace(m, b=50 * m.b) for p, m in own[BAD].items()}  # a width that leaves no room scales it down
    for chosen in (0, CLIENTS * RANK, 10**6):
        method = cast(FedASK, algorithm("fedask", width=chosen).method)
        found.append(
            method.server_step(_sketches(method, own, method.sketch_width(OUT, IN, RANK)), start, RoundContext(1)).extra
        )
    assert all(torch.equal(found[0][n], other[n]) for other in found[1:] for n in found[0])


def test_a_sketch_of_more_directions_than_a_client_has_is_refused_by_its_name() -> None:
    start, made = ServerState(adapter(0)), algorithm("fedask")
    method = cast(FedASK, made.method)
    sent = _sketches(method, [with_tensors(start.adapter, honest(start, c).tensors) for c in range(CLIENTS)], 16)
    method.server_step(sent, start, RoundContext(1))
    full = {n: drawn(5, *t.shape) for n, t in sent[BAD].tensors.items()}
    sent[BAD] = replace(sent[BAD], tensors=full)
    with pytest.raises(UpdateError, match="more directions than its rank of 2") as caught:
        method.server_step(sent, start, RoundContext(1))
    assert caught.value.client == BAD


@pytest.mark.parametrize("name", ["flexlora", "hlora", "florist"])
def test_a_clip_at_the_median_keeps_the_earlier_model_where_r_directions_are_kept(name: str) -> None:
    """One client whose factors have nothing in common with the others', as large as the screening takes them."""
    shares = {}
    for clip in ("none", "median"):
        made = algorithm(name, clip)
        state = made.initial(adapter(0))
        sent = [honest(state, c) for c in range(CLIENTS)]
        apart = {n: 10 * t for n, t in to_tensors(adapter(50)).items()}
        bad = replace(sent[BAD], tensors=apart)
        after = made.server_step([*sent[:BAD], bad, *sent[BAD + 1 :]], state, RoundContext(1))
        shares[clip] = left(model(state), model(after))
    assert shares["none"] < 0.3
    assert shares["median"] > 0.8
