"""Properties of every method in the registry, and of each one's own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.lora import product
from fedtune.lora.product import regauge
from fedtune.lora.state import PREFIX, AdapterState, LoraModule, to_tensors, with_tensors
from fedtune.methods import METHODS, ClientUpdate, Method, ServerState
from fedtune.methods.fedprox import FedProx


def _adapter(seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {f"layer.{i}.q": LoraModule(draw(2, 3), draw(5, 2), 8.0) for i in range(2)}


def _client(method: Method, seed: int, state: ServerState, round_: int) -> dict[str, Tensor]:
    """Return a client's tensors after training: what the method does not train is as downloaded."""
    start, trained = to_tensors(state.adapter), to_tensors(_adapter(seed))
    return {n: trained[n] if method.trainable(round_, n) else start[n] for n in start}


def _updates(
    method: Method, seeds: list[int], examples: list[int], round_: int = 1, state: ServerState | None = None
) -> list[ClientUpdate]:
    known = state or ServerState(_adapter(0))
    made = []
    for client, (seed, count) in enumerate(zip(seeds, examples, strict=True)):
        trained = _client(method, seed, known, round_)
        made.append(ClientUpdate(client, method.payload(trained, to_tensors(known.adapter), round_), count))
    return made


def _model(method: Method, seed: int, round_: int = 1) -> ServerState:
    """Return the state that one client's own model would be."""
    state = ServerState(_adapter(0))
    return ServerState(with_tensors(state.adapter, _client(method, seed, state, round_)))


ROUNDS = [1, 2, 3]


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    kind = METHODS[request.param]
    return kind(kind.Parameters())


def _delta(state: ServerState) -> dict[str, Tensor]:
    return {path: module.delta() for path, module in state.adapter.items()}


def _same(one: ServerState, two: ServerState) -> bool:
    first, second = _delta(one), _delta(two)
    return all(torch.allclose(first[k], second[k], atol=1e-10) for k in first)


@pytest.mark.parametrize("round_", ROUNDS)
def test_one_client_is_its_own_model(method: Method, round_: int) -> None:
    after = method.server_step(_updates(method, [1], [7], round_), ServerState(_adapter(0)), round_)
    assert _same(after, _model(method, 1, round_))
    assert after.round == round_


@pytest.mark.parametrize("round_", ROUNDS)
def test_identical_clients_are_a_fixed_point(method: Method, round_: int) -> None:
    after = method.server_step(_updates(method, [1, 1, 1], [3, 5, 7], round_), ServerState(_adapter(0)), round_)
    assert _same(after, _model(method, 1, round_))


@pytest.mark.parametrize("round_", ROUNDS)
def test_the_order_of_clients_does_not_matter(method: Method, round_: int) -> None:
    updates = _updates(method, [1, 2, 3], [3, 5, 7], round_)
    state = ServerState(_adapter(0))
    assert _same(method.server_step(updates, state, round_), method.server_step(updates[::-1], state, round_))


@pytest.mark.parametrize("round_", ROUNDS)
def test_a_method_that_says_exact_is_the_mean_of_the_effective_updates(method: Method, round_: int) -> None:
    updates = _updates(method, [1, 2, 3], [3, 5, 7], round_)
    after = _delta(method.server_step(updates, ServerState(_adapter(0)), round_))
    deltas = [_delta(_model(method, seed, round_)) for seed in (1, 2, 3)]
    gap = max(
        float((after[k] - sum(w / 15 * d[k] for w, d in zip((3, 5, 7), deltas, strict=True))).norm()) for k in after
    )
    assert (gap < 1e-10) is method.exact


# the factors are averaged apart, so how a client splits its product matters to them
GAUGE_DEPENDENT = {"fedit", "fedprox", "fedrot_lora", "lora_fair"}


def test_a_change_of_gauge_by_one_client_changes_nothing_unless_the_method_is_known_for_it(method: Method) -> None:
    state = ServerState(_adapter(0))
    plain = _updates(method, [1, 2], [1, 1])
    tensors = dict(plain[0].tensors)
    turned = {
        n: regauge(m, torch.tensor([[2.0, 1.0], [0.5, -3.0]], dtype=torch.float64)) for n, m in _adapter(1).items()
    }
    for name, tensor in to_tensors(turned).items():
        if name in tensors:
            tensors[name] = tensor
    frozen = set(to_tensors(state.adapter)) - set(tensors)
    if frozen:
        return  # with a common frozen factor a client has no gauge to choose
    moved = [ClientUpdate(0, tensors, 1), plain[1]]
    same = _same(method.server_step(plain, state, 1), method.server_step(moved, state, 1))
    assert same is (method.name not in GAUGE_DEPENDENT)


@pytest.mark.parametrize("round_", ROUNDS)
def test_what_is_not_trained_is_bit_for_bit_what_it_was(method: Method, round_: int) -> None:
    state = ServerState(_adapter(0))
    sent = _updates(method, [1, 2], [1, 1], round_)[0].tensors
    assert all(method.trainable(round_, n) for n in sent)
    if method.name in ("ffa_lora", "rolora"):
        after = to_tensors(method.server_step(_updates(method, [1, 2], [1, 1], round_), state, round_).adapter)
        before = to_tensors(state.adapter)
        assert all(torch.equal(after[n], before[n]) for n in before if not method.trainable(round_, n))


def test_a_doubled_client_is_a_doubled_weight(method: Method) -> None:
    state = ServerState(_adapter(0))
    doubled = method.server_step(_updates(method, [1, 2, 2], [4, 6, 6]), state, 1)
    assert _same(doubled, method.server_step(_updates(method, [1, 2], [4, 12]), state, 1))


def test_the_state_given_is_not_changed(method: Method) -> None:
    state = ServerState(_adapter(0))
    method.server_step(_updates(method, [1, 2], [1, 1]), state, 1)
    assert _same(state, ServerState(_adapter(0)))


def test_what_a_client_downloads_fits_what_it_must_send(method: Method) -> None:
    state = ServerState(_adapter(0))
    view, expected = method.view(state, 0), method.expected(state, 0, 1)
    assert set(view) <= set(to_tensors(state.adapter))
    assert set(_updates(method, [1], [1])[0].tensors) == set(expected)


def test_every_method_says_where_it_comes_from(method: Method) -> None:
    assert method.paper.startswith("arXiv:")
    assert method.title
    assert (type(method).__doc__ or "").strip()


def test_fedit_is_the_mean_of_the_factors_and_off_by_their_covariance() -> None:
    method = METHODS["fedit"](METHODS["fedit"].Parameters())
    updates = _updates(method, [1, 2], [1, 3])
    after = method.server_step(updates, ServerState(_adapter(0)), 1).adapter["layer.0.q"]
    one, two = _adapter(1)["layer.0.q"], _adapter(2)["layer.0.q"]
    assert torch.allclose(after.a, 0.25 * one.a + 0.75 * two.a)
    assert torch.allclose(after.b, 0.25 * one.b + 0.75 * two.b)
    ideal = 0.25 * one.delta() + 0.75 * two.delta()
    spread = sum(w * (m.b - after.b) @ (m.a - after.a) for w, m in ((0.25, one), (0.75, two)))
    assert torch.allclose(ideal - after.delta(), after.scale * spread)


def test_fedprox_pulls_towards_the_download_with_mu_times_the_distance() -> None:
    method = FedProx(FedProx.Parameters(mu=0.3))
    start = to_tensors(_adapter(0))
    now: dict[str, Any] = {k: t.clone().requires_grad_() for k, t in to_tensors(_adapter(1)).items()}
    term = method.loss_term(now, start)
    assert term is not None
    term.backward()
    for name, tensor in now.items():
        assert torch.allclose(tensor.grad, 0.3 * (tensor.detach() - start[name]))
    assert METHODS["fedit"](METHODS["fedit"].Parameters()).loss_term(now, start) is None


def test_views_are_rebuilt_into_the_same_adapter() -> None:
    method = METHODS["fedit"](METHODS["fedit"].Parameters())
    state = ServerState(_adapter(4))
    assert _same(ServerState(with_tensors(state.adapter, method.view(state, 3))), state)


def _mean_product(seeds: list[int], weights: list[float], path: str = "layer.0.q") -> Tensor:
    return sum(w / sum(weights) * _adapter(s)[path].delta() for s, w in zip(seeds, weights, strict=True))  # type: ignore[return-value]


def test_flexlora_is_the_best_rank_r_approximation_of_the_mean_product() -> None:
    method = METHODS["flexlora"](METHODS["flexlora"].Parameters())
    after = method.server_step(_updates(method, [1, 2, 3], [1, 2, 3]), ServerState(_adapter(0)), 1)
    ideal = _mean_product([1, 2, 3], [1.0, 2.0, 3.0])
    values = torch.linalg.svdvals(ideal)
    error = (ideal - after.adapter["layer.0.q"].delta()).norm()
    assert torch.allclose(error**2, values[2:].square().sum())
    fedit = METHODS["fedit"](METHODS["fedit"].Parameters())
    worse = fedit.server_step(_updates(fedit, [1, 2, 3], [1, 2, 3]), ServerState(_adapter(0)), 1)
    assert error < (ideal - worse.adapter["layer.0.q"].delta()).norm()


def test_fedsvd_keeps_the_product_and_has_orthonormal_rows() -> None:
    method = METHODS["fedsvd"](METHODS["fedsvd"].Parameters())
    after = method.server_step(_updates(method, [1, 2], [1, 1]), ServerState(_adapter(0)), 1).adapter["layer.0.q"]
    assert torch.allclose(after.a @ after.a.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    gram = after.b.T @ after.b
    assert torch.allclose(gram, torch.diag(torch.diag(gram)), atol=1e-10)
    zero = {p: LoraModule(m.a, torch.zeros_like(m.b), m.alpha) for p, m in _adapter(0).items()}
    still = method.orthogonalise(zero["layer.0.q"])  # type: ignore[attr-defined]
    assert torch.equal(still.a, zero["layer.0.q"].a)


def test_fedrot_keeps_every_product_and_makes_pure_rotations_exact() -> None:
    method = METHODS["fedrot_lora"](METHODS["fedrot_lora"].Parameters())
    state = ServerState(_adapter(0))
    start = to_tensors(state.adapter)
    for round_ in (2, 3):
        sent = with_tensors(state.adapter, method.payload(to_tensors(_adapter(1)), start, round_))
        for path, module in sent.items():
            assert torch.allclose(module.delta(), _adapter(1)[path].delta())
        name = "layer.0.q"
        was, now = _adapter(1)[name], sent[name]
        reference = state.adapter[name]
        moved = (now.a - reference.a).norm() if round_ % 2 else (now.b - reference.b).norm()
        still = (was.a - reference.a).norm() if round_ % 2 else (was.b - reference.b).norm()
        assert moved <= still + 1e-12
    turns = [product.nearest_orthogonal(torch.randn(2, 2, dtype=torch.float64)) for _ in range(3)]
    updates = []
    for client, turn in enumerate(turns):
        turned = {p: LoraModule(turn.T @ m.a, m.b @ turn, m.alpha) for p, m in _adapter(1).items()}
        updates.append(ClientUpdate(client, method.payload(to_tensors(turned), start, 3), 1))
    after = method.server_step(updates, state, 3)
    assert _same(after, ServerState(_adapter(1)))


def test_lora_fair_lies_between_fedit_and_the_projection() -> None:
    kind = METHODS["lora_fair"]
    state, ideal = ServerState(_adapter(0)), _mean_product([1, 2], [1.0, 1.0])

    def after(ridge: float) -> LoraModule:
        method = kind(kind.Parameters.model_validate({"ridge": ridge}))
        return method.server_step(_updates(method, [1, 2], [1, 1]), state, 1).adapter["layer.0.q"]

    fedit = METHODS["fedit"](METHODS["fedit"].Parameters())
    mean = fedit.server_step(_updates(fedit, [1, 2], [1, 1]), state, 1).adapter["layer.0.q"]
    assert torch.allclose(after(1e12).delta(), mean.delta(), atol=1e-8)
    basis = torch.linalg.qr(mean.a.T)[0]
    assert torch.allclose(after(1e-12).delta(), ideal @ basis @ basis.T, atol=1e-8)
    assert (ideal - after(0.01).delta()).norm() < (ideal - mean.delta()).norm()


def test_rolora_trains_b_first() -> None:
    method = METHODS["rolora"](METHODS["rolora"].Parameters())
    names = [PREFIX + "x" + end for end in (".lora_A.weight", ".lora_B.weight")]
    assert [[method.trainable(r, n) for n in names] for r in (1, 2, 3)] == [[False, True], [True, False], [False, True]]


def test_methods_not_defined_for_dora_refuse_it_by_name() -> None:
    from fedtune.methods import problems

    config = Config.model_validate({"domain": "x", "lora": {"dora": True}, "method": {"name": "flexlora"}})
    assert "flexlora is not defined for DoRA's magnitudes; these are: fedit, fedprox" in str(
        next(iter(problems(config)))
    )
