"""Properties of every method in the registry, and of each one's own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.lora.state import AdapterState, LoraModule, to_tensors, with_tensors
from fedtune.methods import METHODS, ClientUpdate, Method, ServerState
from fedtune.methods.fedprox import FedProx


def _adapter(seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {f"layer.{i}.q": LoraModule(draw(2, 3), draw(5, 2), 8.0) for i in range(2)}


def _updates(method: Method, seeds: list[int], examples: list[int], round_: int = 1) -> list[ClientUpdate]:
    start = to_tensors(_adapter(99))
    made = []
    for client, (seed, count) in enumerate(zip(seeds, examples, strict=True)):
        payload = method.payload(to_tensors(_adapter(seed)), start, round_)
        made.append(ClientUpdate(client, payload, count))
    return made


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    kind = METHODS[request.param]
    return kind(kind.Parameters())


def _delta(state: ServerState) -> dict[str, Tensor]:
    return {path: module.delta() for path, module in state.adapter.items()}


def _same(one: ServerState, two: ServerState) -> bool:
    first, second = _delta(one), _delta(two)
    return all(torch.allclose(first[k], second[k], atol=1e-10) for k in first)


def test_one_client_is_its_own_model(method: Method) -> None:
    after = method.server_step(_updates(method, [1], [7]), ServerState(_adapter(0)), 1)
    assert _same(after, ServerState(_adapter(1)))
    assert after.round == 1


def test_identical_clients_are_a_fixed_point(method: Method) -> None:
    after = method.server_step(_updates(method, [1, 1, 1], [3, 5, 7]), ServerState(_adapter(0)), 1)
    assert _same(after, ServerState(_adapter(1)))


def test_the_order_of_clients_does_not_matter(method: Method) -> None:
    updates = _updates(method, [1, 2, 3], [3, 5, 7])
    state = ServerState(_adapter(0))
    assert _same(method.server_step(updates, state, 1), method.server_step(updates[::-1], state, 1))


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
    assert set(expected) <= set(view)
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
