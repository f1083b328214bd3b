from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.lora.algebra import weighted_mean
from fedtune.lora.state import LoraModule, parameters, to_tensors, with_tensors
from fedtune.types import AdapterError


def _module(out: int = 5, inner: int = 3, rank: int = 2, **extra: Any) -> LoraModule:
    return LoraModule(
        torch.randn(rank, inner, dtype=torch.float64), torch.randn(out, rank, dtype=torch.float64), 4.0, **extra
    )


def test_the_delta_has_the_scale_and_the_orientation_of_the_weight() -> None:
    module = _module()
    assert torch.allclose(module.delta(), 2.0 * module.b @ module.a)
    stable = LoraModule(module.a, module.b, 4.0, rslora=True)
    assert stable.scale == pytest.approx(4 / 2**0.5)
    assert LoraModule(module.a, module.b, 4.0, conv1d=True).delta().shape == (3, 5)


def test_the_delta_accumulates_in_float32() -> None:
    half = LoraModule(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 2, dtype=torch.bfloat16), 2.0)
    assert half.delta().dtype == torch.float32


def test_states_go_to_peft_names_and_back_strictly() -> None:
    state = {"model.layers.0.self_attn.q_proj": _module(magnitude=torch.ones(5)), "lm.v": _module()}
    tensors = to_tensors(state)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector" in tensors
    again = with_tensors(state, {k: t + 1 for k, t in tensors.items()})
    assert torch.equal(again["lm.v"].a, state["lm.v"].a + 1)
    assert parameters(state) == 2 * (2 * 3 + 5 * 2) + 5
    tensors.pop("base_model.model.lm.v.lora_A.weight")
    with pytest.raises(AdapterError, match=r"lm\.v\.lora_A"):
        with_tensors(state, tensors)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=5))
def test_the_mean_is_the_weighted_one_and_only_ratios_of_weights_matter(weights: list[float]) -> None:
    torch.manual_seed(0)
    states = [{"x": torch.randn(3, 4, dtype=torch.float64)} for _ in weights]
    want = sum(w * s["x"] for w, s in zip(weights, states, strict=True)) / sum(weights)
    assert torch.allclose(weighted_mean(states, weights)["x"], want, atol=1e-12)
    assert torch.allclose(weighted_mean(states, [10 * w for w in weights])["x"], want, atol=1e-12)


def test_half_precision_is_summed_in_float32() -> None:
    states = [{"x": torch.full((4,), 1.0 + 2**-7, dtype=torch.bfloat16)} for _ in range(64)]
    assert torch.equal(weighted_mean(states, [1.0] * 64)["x"], states[0]["x"])


def test_weights_that_sum_to_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to 0"):
        weighted_mean([{"x": torch.ones(1)}], [0.0])
