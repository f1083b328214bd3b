"""A state that is not made of factors stands wherever an adapter stands, and refuses what only factors have."""

from collections.abc import Callable

import pytest
import torch

from fedtune import methods
from fedtune.federation import messages
from fedtune.lora import algebra, product
from fedtune.lora.base_delta import as_adapter, effective
from fedtune.lora.state import AdapterState, Plain, parameters, to_tensors, with_tensors
from fedtune.methods import METHODS, ClientUpdate, RoundContext, ServerState
from fedtune.models.budget import message_bytes
from fedtune.names import FACTORS, PREFIX, ROLES, is_side, rank_axis
from fedtune.settings import load
from fedtune.types import AdapterError

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "one": torch.tensor(2.0)}
STATE = Plain("full", TENSORS)


def test_a_plain_state_is_its_tensors() -> None:
    assert to_tensors(STATE).keys() == TENSORS.keys()
    assert parameters(STATE) == 9
    again = with_tensors(STATE, {n: t + 1 for n, t in TENSORS.items()})
    assert isinstance(again, Plain)
    assert again.space == "full"
    assert torch.equal(to_tensors(again)["w"], TENSORS["w"] + 1)
    assert as_adapter(STATE) is STATE
    with pytest.raises(AdapterError, match="not those expected"):
        with_tensors(STATE, {"w": TENSORS["w"]})


ASKED: dict[str, Callable[[AdapterState], object]] = {
    "layer": lambda state: state["w"],
    "layers": list,
    "count": len,
    "products": lambda state: {path: product.of(module) for path, module in state.items()},
    "effective": effective,
    "copy": dict,
}


@pytest.mark.parametrize("what", ASKED)
def test_a_product_of_a_plain_state_is_a_typed_error(what: str) -> None:
    with pytest.raises(AdapterError, match="full: its tensors are no low-rank factors"):
        ASKED[what](STATE)


def test_its_gram_matrix_is_that_of_the_flattened_tensors() -> None:
    torch.manual_seed(1)
    sets = [{"a": torch.randn(2, 3), "b": torch.randn(4)} for _ in range(3)]
    flat = torch.stack([torch.cat([t.double().flatten() for t in one.values()]) for one in sets])
    assert torch.allclose(algebra.gram(sets), flat @ flat.T, rtol=1e-14)


def test_the_mean_of_clients_by_hand() -> None:
    method = METHODS["fedit"](METHODS["fedit"].Parameters())
    sent = [{"w": torch.full((2, 3), float(value))} for value in (1, 4)]
    updates = [ClientUpdate(c, t, n) for c, (t, n) in enumerate(zip(sent, (1, 3), strict=True))]
    after = method.server_step(updates, ServerState(Plain("full", {"w": torch.zeros(2, 3)})), RoundContext(1))
    assert torch.equal(to_tensors(after.adapter)["w"], torch.full((2, 3), 3.25))


def test_changes_below_the_spacing_of_the_weights_add_up() -> None:
    """One client of four moves weights of 1 by their spacing 2**-7: the mean moves by a quarter of it each round."""
    chosen = load([{"domain": "finance", "peft": {"kind": "full"}}]).config
    algorithm = methods.create(chosen)
    state = algorithm.initial(Plain("full", {"w": torch.ones(3).bfloat16(), "count": torch.tensor(5)}))
    for round_ in range(1, 5):
        sent = algorithm.view(state, 0)
        assert (sent["w"].dtype, sent["count"].dtype) == (torch.bfloat16, torch.int64)
        assert algorithm.upload(state, 0, round_).tensors["w"].dtype == torch.bfloat16
        moves = [2**-7, 0, 0, 0]
        updates = [ClientUpdate(c, {"w": sent["w"] + move}, 8.0, version=round_ - 1) for c, move in enumerate(moves)]
        state = algorithm.server_step(updates, state, RoundContext(round_))
        assert torch.equal(to_tensors(state.adapter)["w"], torch.full((3,), 1 + round_ * 2**-9))
    assert float(algorithm.view(state, 0)["w"][0]) == 1 + 2**-7


@pytest.mark.parametrize("near", [True, False])
def test_bfloat16_travels_bit_for_bit_in_as_many_bytes_as_predicted(near: bool) -> None:
    sent = {"half": torch.randn(5, 3).bfloat16(), "whole": torch.randn(4), "one": torch.tensor(1.5).bfloat16()}
    record = messages.pack(sent, in_process=near)
    assert sum(len(array.data) for array in record.values()) == message_bytes(sent)
    got = messages.unpack(record)
    assert all(got[n].dtype == t.dtype and torch.equal(got[n], t) for n, t in sent.items())


def test_the_axis_of_ranks_is_that_of_the_roles() -> None:
    assert [rank_axis(PREFIX + "x" + end) for end in FACTORS] == [ROLES[end].index("rank") for end in FACTORS] == [0, 1]
    assert rank_axis("model.layers.0.mlp.down_proj.weight") is None


def test_a_weight_of_the_base_model_is_no_side_tensor() -> None:
    assert is_side(PREFIX + "model.layers.0.mlp.router.weight")
    assert not is_side("model.layers.0.mlp.router.weight")
