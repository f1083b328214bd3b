"""Properties that every method in the registry has, or is known not to have. Float64, non-square, both orientations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.lora import product
from fedtune.lora.base_delta import effective
from fedtune.lora.product import regauge
from fedtune.lora.state import AdapterState, LoraModule, to_tensors
from fedtune.methods import METHODS, ClientUpdate, Method, RoundContext, RunContext, ServerState, problems
from fedtune.methods.aggregation import aggregate
from fedtune.methods.state import Sizes
from fedtune.methods.traits import magnitudes

OUT, IN, RANK = 7, 5, 2


def adapter(seed: int, rank: int = RANK, alpha: float = 8.0, *, rslora: bool = False) -> AdapterState:
    """Two layers, one of them stored the other way round."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        f"layer.{i}.q": LoraModule(draw(rank, IN), draw(OUT, rank), alpha, rslora, conv1d=bool(i)) for i in range(2)
    }


def make(name: str, **settings: Any) -> Method:
    kind = METHODS[name]
    return kind(kind.Parameters.model_validate(settings), RunContext(seed=3, rank=RANK))


START = adapter(0)


def clients(method: Method, seeds: list[int], round_: int) -> list[AdapterState]:
    """Return adapters as the method's clients may have them: what has to be common is the start's."""
    found = []
    for seed in seeds:
        own, first = to_tensors(adapter(seed)), to_tensors(START)
        tensors = {n: first[n] if not method.trainable(round_, n) else t for n, t in own.items()}
        found.append(_state(tensors))
    return found


def _state(tensors: Mapping[str, Tensor]) -> AdapterState:
    from fedtune.lora.state import with_tensors

    return with_tensors(START, tensors)


def dense(state: ServerState) -> dict[str, Tensor]:
    return {path: whole.dense() for path, whole in effective(state.adapter, state.base).items()}


def mean(adapters: list[AdapterState], weights: list[float]) -> dict[str, Tensor]:
    """The ideal update, by dense matrices."""
    shares = [w / sum(weights) for w in weights]
    return {
        p: sum(w * a[p].scale * a[p].b @ a[p].a for w, a in zip(shares, adapters, strict=True))  # type: ignore[misc]
        for p in adapters[0]
    }


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor], atol: float = 1e-10) -> bool:
    return all(torch.allclose(one[k], two[k], atol=atol) for k in one)


def run(method: Method, adapters: list[AdapterState], weights: list[float], round_: int = 1) -> dict[str, Tensor]:
    state = ServerState(START, round_ - 1)
    after, own = aggregate(method, adapters, weights, state)
    if own is not None:
        return {f"{i}.{p}": m.scale * m.b @ m.a for i, a in enumerate(own) for p, m in a.items()}
    return dense(after)


ROUNDS = [1, 2, 3]
GLOBAL = [n for n in METHODS if METHODS[n].models != "own"]
FIXED = [n for n in GLOBAL if METHODS[n].guarantee != "none"]


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    return make(request.param)


@pytest.fixture(params=GLOBAL)
def shared(request: pytest.FixtureRequest) -> Method:
    return make(request.param)


@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("name", FIXED)
def test_one_client_is_its_own_model(name: str, round_: int) -> None:
    one = clients(make(name), [1], round_)
    assert same(run(make(name), one, [7.0], round_), mean(one, [1.0]))


@pytest.mark.parametrize("round_", ROUNDS)
@pytest.mark.parametrize("name", FIXED)
def test_identical_clients_are_a_fixed_point(name: str, round_: int) -> None:
    three = clients(make(name), [1, 1, 1], round_)
    assert same(run(make(name), three, [3.0, 5.0, 7.0], round_), mean(three[:1], [1.0]))


@pytest.mark.parametrize("round_", ROUNDS)
def test_zero_updates_leave_the_model_as_it_is(shared: Method, round_: int) -> None:
    assert same(run(shared, [START, START], [1.0, 2.0], round_), mean([START], [1.0]))


@pytest.mark.parametrize("round_", ROUNDS)
def test_the_order_of_clients_does_not_matter(shared: Method, round_: int) -> None:
    three, weights = clients(shared, [1, 2, 3], round_), [3.0, 5.0, 7.0]
    assert same(run(shared, three, weights, round_), run(shared, three[::-1], weights[::-1], round_))


def test_only_the_ratio_of_weights_counts(method: Method) -> None:
    three = clients(method, [1, 2, 3], 1)
    assert same(run(method, three, [1.0, 2.0, 3.0]), run(method, three, [10.0, 20.0, 30.0]))


def test_a_doubled_client_is_a_doubled_weight(shared: Method) -> None:
    one, two = clients(shared, [1, 2], 1)
    assert same(run(shared, [one, two, two], [4.0, 6.0, 6.0]), run(shared, [one, two], [4.0, 12.0]))


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_method_that_says_exact_is_the_mean_of_the_effective_updates(shared: Method, round_: int) -> None:
    three, weights = clients(shared, [1, 2, 3], round_), [3.0, 5.0, 7.0]
    # rounds in which one factor is common are exact for anyone who averages the other
    assert same(run(shared, three, weights, round_), mean(three, weights)) is (shared.guarantee == "exact")


# the factors are averaged apart, so how a client splits its product matters to them
GAUGE_DEPENDENT = {"fedit", "fedrot_lora", "lora_fair", "rbla", "fedilora", "hetlora", "feddpa", "fedkseed"}


def test_a_change_of_gauge_by_one_client_changes_nothing_unless_the_method_is_known_for_it(shared: Method) -> None:
    one, two = clients(shared, [1, 2], 1)
    if any(not shared.trainable(1, n) for n in to_tensors(START)):
        return  # with a common frozen factor a client has no gauge to choose
    gauge = torch.tensor([[2.0, 1.0], [0.5, -3.0]], dtype=torch.float64)
    moved = {path: regauge(m, gauge) for path, m in one.items()}
    unchanged = same(run(shared, [one, two], [1.0, 1.0]), run(shared, [moved, two], [1.0, 1.0]))
    assert unchanged is (shared.name not in GAUGE_DEPENDENT)


def test_no_method_is_in_neither_list() -> None:
    frozen = {n for n in GLOBAL if any(not make(n).trainable(1, t) for t in to_tensors(START))}
    invariant = {"flora", "fedex_lora", "flexlora", "hlora", "florist", "fedmomentum", "fedask"}
    assert GAUGE_DEPENDENT | frozen | invariant == set(GLOBAL)


@pytest.mark.parametrize("change", [{"alpha": 2.0}, {"alpha": 3.0, "rslora": True}])
def test_the_same_update_under_another_alpha_is_the_same_update(method: Method, change: dict[str, Any]) -> None:
    one, two = clients(method, [1, 2], 1)
    other = {}
    for path, module in two.items():
        moved = replace(module, **change)
        other[path] = replace(moved, b=module.b * (module.scale / moved.scale))
    if any(not method.trainable(1, n) for n in to_tensors(START)):
        assert same(mean([two], [1.0]), mean([other], [1.0]))
    assert same(run(method, [one, two], [1.0, 3.0]), run(method, [one, other], [1.0, 3.0]))


def test_half_precision_is_summed_in_float32(method: Method) -> None:
    three = clients(method, [1, 2, 3], 1)
    half = [{p: replace(m, a=m.a.bfloat16(), b=m.b.bfloat16()) for p, m in a.items()} for a in [*three, START]]
    wide = [{p: replace(m, a=m.a.double(), b=m.b.double()) for p, m in a.items()} for a in half]

    def result(adapters: list[AdapterState]) -> dict[str, Tensor]:
        after = aggregate(method, adapters[:3], [1.0, 2.0, 3.0], ServerState(adapters[3]))[0]
        if method.models == "own":  # only A is the server's
            return {p: m.a.double() for p, m in after.adapter.items()}
        return {p: w.dense().double() for p, w in effective(after.adapter, after.base).items()}

    low, high = result(half), result(wide)
    assert all((low[p] - high[p]).norm() < 0.02 * high[p].norm() for p in low)


def test_the_same_call_gives_the_same_bits_and_changes_no_input(method: Method) -> None:
    three = clients(method, [1, 2, 3], 1)
    before = [{n: t.clone() for n, t in to_tensors(a).items()} for a in [*three, START]]
    one, two = (run(method, three, [1.0, 2.0, 3.0]) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    after = [to_tensors(a) for a in [*three, START]]
    assert all(torch.equal(b[n], a[n]) for b, a in zip(before, after, strict=True) for n in b)


MIXED = [adapter(1, 1, 4.0), adapter(2, 3, 16.0, rslora=True), adapter(3, 2, 8.0)]


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].mixed_ranks and n != "lora_a2"])
def test_mixed_ranks_and_scales(name: str) -> None:
    method, weights = make(name), [1.0, 2.5, 0.5]
    got, ideal = run(method, MIXED, weights), mean(MIXED, weights)
    if method.guarantee == "exact":
        assert same(got, ideal)
    alone = run(method, MIXED[1:2], [1.0])
    assert same(alone, mean(MIXED[1:2], [1.0]))
    assert same(run(method, MIXED[::-1], weights[::-1]), got)


def test_every_flag_is_told_in_the_same_words(method: Method) -> None:
    assert method.paper.startswith("arXiv:")
    assert method.title
    assert (type(method).__doc__ or "").strip()
    assert magnitudes(type(method)) in ("", "mean", "exact")
    up, down = method.traffic(Sizes(4096 * 32, 1024 * 32, 32, 10))
    assert up >= 0 <= down


def test_names_are_those_of_the_files(method: Method) -> None:
    assert type(method).__module__ == f"fedtune.methods.{method.name}"


@dataclass(frozen=True)
class Refusal:
    settings: dict[str, Any]
    said: str


REFUSALS = [
    Refusal({"lora": {"dora": True}, "method": {"name": "flora"}}, "flora is not defined for DoRA's magnitudes"),
    Refusal({"lora": {"ranks": [4, 8, 16, 2]}}, "fedit needs one rank for all clients; mixed ranks: flora, flexlora"),
    Refusal({"lora": {"ranks": [4, 8]}, "method": {"name": "flora"}}, "has 2 ranks for 4 clients"),
    Refusal({"server": {"optimizer": "fedadam"}, "method": {"name": "flexlora"}}, "flexlora's factors change"),
    Refusal({"robust": {"rule": "krum"}, "method": {"name": "fed_sb"}}, "an update of fed_sb cannot be compared"),
    Refusal({"drift": {"scaffold": True}}, "is defined for SGD only; set train.optimizer = sgd"),
    Refusal(
        {"drift": {"scaffold": True}, "train": {"optimizer": "sgd"}, "method": {"name": "fedalt"}},
        "its control variates do not fit fedalt",
    ),
    Refusal({"attack": {"kind": "boost", "clients": [9]}}, "there are clients 0 to 3"),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda c: c.said)
def test_what_does_not_go_together_is_refused_by_name(case: Refusal) -> None:
    config = Config.model_validate({"domain": "finance", **case.settings})
    assert any(case.said in str(p) for p in problems(config)), [str(p) for p in problems(config)]


def test_product_space_methods_are_never_worse_than_fedit() -> None:
    three, weights = clients(make("fedit"), [1, 2, 3], 1), [1.0, 2.0, 3.0]
    ideal = mean(three, weights)

    def error(name: str) -> float:
        got = run(make(name), three, weights)
        return sum(float((got[p] - ideal[p]).norm() ** 2) for p in got) ** 0.5

    assert error("flexlora") <= error("fedit") + 1e-12
    assert error("lora_fair") <= error("fedit") + 1e-12
    assert error("flexlora") == pytest.approx(
        sum(float(product.norm(product.split(product.stack([c[p] for c in three], weights), 2)[1]) ** 2) for p in ideal)
        ** 0.5
    )


def test_a_running_sum_is_the_sum(method: Method) -> None:
    """Who says it needs the mean only gets the same from the updates one by one."""
    if not method.linear:
        return
    three, weights, state = clients(method, [1, 2, 3], 2), [1.0, 2.0, 3.0], ServerState(START, 1)
    summed = aggregate(method, three, weights, state)[0]
    start = to_tensors(START)
    sent = [
        ClientUpdate(i, method.payload(to_tensors(a), start, 2), w)
        for i, (a, w) in enumerate(zip(three, weights, strict=True))
    ]
    stepped = method.server_step(sent, state, RoundContext(2))
    if method.models != "own":
        assert same(dense(summed), dense(stepped))
    assert all(torch.allclose(m.a, stepped.adapter[p].a) for p, m in summed.adapter.items())


def _big(rank: int, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {"layer.q": LoraModule(draw(rank, 60), draw(40, rank), 8.0)}


def _steady(method: Method, state: ServerState, number: int) -> tuple[list[int], list[int]]:
    """Play rounds with updates of the expected shapes; return the numbers each exchange took of client 0, by round."""
    ups, downs = [], []
    for round_ in range(1, 6):
        up = down = 0
        while state.round < round_:
            view, expected = method.view(state, 0), method.upload(state, 0, round_).tensors
            if method.name == "lora_a2":
                ranks = method.budget(state.adapter, 0)  # type: ignore[attr-defined]
                axis = 1 if round_ % 2 else 0
                expected = {n: t.narrow(0 if n.endswith("chosen") else axis, 0, ranks) for n, t in expected.items()}
            down += sum(t.numel() for t in view.values() if t.dim())
            up += sum(t.numel() for n, t in expected.items() if not n.endswith("chosen"))
            sent = []
            for client in range(number):
                generator = torch.Generator().manual_seed(100 * round_ + client)
                noise = {
                    n: t if n.endswith("chosen") else torch.randn(t.shape, generator=generator, dtype=torch.float64)
                    for n, t in expected.items()
                }
                # a sketch has no more directions than the rank
                noise = {n: t[:, :1] * t[:1] if n.startswith("fedask/Y") else t for n, t in noise.items()}
                sent.append(ClientUpdate(client, noise, 1.0))
            state = method.server_step(sent, state, RoundContext(round_))
        ups.append(up)
        downs.append(down)
    return ups, downs


@pytest.mark.parametrize("name", [n for n in METHODS if n != "fedkseed"])
def test_the_traffic_that_is_listed_is_the_traffic_there_is(name: str) -> None:
    rank, number = 2, 3
    kind = METHODS[name]
    method = kind(kind.Parameters(), RunContext(seed=1, rank=rank, cohort=number))
    ups, downs = _steady(method, ServerState(_big(rank, 0)), number)
    up, down = method.traffic(Sizes(rank * 60, rank * 40, rank, number))
    assert sum(ups[-2:]) / 2 == pytest.approx(up)
    assert sum(downs[-2:]) / 2 == pytest.approx(down)
