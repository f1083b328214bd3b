"""Oracles of product space: dense matrices, Eckart-Young, and PEFT's own combinations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import product
from fedtune.lora.state import LoraModule


def _module(seed: int, rank: int, alpha: float, rslora: bool = False, out: int = 7, inner: int = 5) -> LoraModule:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LoraModule(a, b, alpha, rslora)


MIXED = [_module(1, 2, 4.0), _module(2, 3, 16.0, True), _module(3, 1, 8.0)]
WEIGHTS = [1.0, 2.5, 0.5]


def _dense() -> torch.Tensor:
    return sum(w * m.delta() for w, m in zip(WEIGHTS, MIXED, strict=True)) / sum(WEIGHTS)  # type: ignore[return-value]


def test_the_stack_is_the_mean_with_mixed_ranks_alphas_and_scales() -> None:
    stacked = product.stack(MIXED, WEIGHTS)
    assert stacked.left.shape == (7, 6)
    assert torch.allclose(stacked.dense(), _dense(), atol=1e-12)


def test_the_thin_svd_is_the_dense_one() -> None:
    u, s, vh = product.svd(product.stack(MIXED, WEIGHTS))
    assert torch.allclose(s, torch.linalg.svdvals(_dense())[: len(s)], atol=1e-12)
    assert torch.allclose(u * s @ vh, _dense(), atol=1e-12)
    assert torch.allclose(u.T @ u, torch.eye(len(s), dtype=torch.float64), atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9))
def test_the_truncation_error_is_the_eckart_young_tail(rank: int) -> None:
    best = product.truncate(product.stack(MIXED, WEIGHTS), rank)
    assert best.left.shape == (7, rank)
    tail = torch.linalg.svdvals(_dense())[rank:].square().sum()
    assert torch.allclose((best.dense() - _dense()).square().sum(), tail, atol=1e-10)


def test_truncations_are_nested() -> None:
    four, two = (product.truncate(product.stack(MIXED, WEIGHTS), r) for r in (4, 2))
    assert torch.allclose(four.left[:, :2].abs(), two.left.abs(), atol=1e-10)


def test_a_rotation_is_found_again() -> None:
    turn = product.nearest_orthogonal(torch.randn(3, 3, dtype=torch.float64))
    a = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(product.rotation_to(turn @ a, a), turn, atol=1e-10)


def test_regauging_keeps_the_product() -> None:
    module = MIXED[1]
    gauge = torch.randn(3, 3, dtype=torch.float64)
    assert torch.allclose(product.regauge(module, gauge).delta(), module.delta(), atol=1e-10)


def test_bfloat16_comes_out_of_float32_sums() -> None:
    half = [LoraModule(m.a.bfloat16(), m.b.bfloat16(), m.alpha) for m in MIXED]
    assert product.stack(half, WEIGHTS).left.dtype == torch.float32


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_peft_combines_adapters_to_the_same_delta(tiny_folder: Path, how: str) -> None:
    """PEFT's `add_weighted_adapter` is an independent implementation of the stack and of the truncated SVD."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ranks = [2, 3]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)

    def settings_of(rank: int) -> Any:
        return LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=["v_proj"], init_lora_weights=False)

    model = get_peft_model(base, settings_of(ranks[0]), "one")
    model.add_adapter("two", settings_of(ranks[1]))
    extra = {"svd_rank": 2} if how == "svd" else {}
    model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "mixed", combination_type=how, **extra)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    parts = [
        LoraModule(layer.lora_A[n].weight, layer.lora_B[n].weight, 4.0 * r)
        for n, r in zip(("one", "two"), ranks, strict=True)
    ]
    ours = product.stack(parts, [0.25, 0.75])
    if how == "svd":
        ours = product.truncate(ours, 2)
    assert torch.allclose(ours.dense(), layer.get_delta_weight("mixed"), atol=1e-5)


def _float(module: LoraModule) -> LoraModule:
    return LoraModule(module.a.float(), module.b.float(), module.alpha, module.rslora)


@pytest.mark.parametrize("count", [1, 3])
def test_the_fast_way_in_float32_is_the_slow_one(count: int) -> None:
    modules = [_float(_module(i, 3, 6.0, out=40, inner=30)) for i in range(count)]
    stacked = product.stack(modules, [1.0 + i for i in range(count)])
    fast = product._svd_by_gram(stacked)
    assert fast is not None
    u, s, vh = fast
    slow = product._svd_by_qr(product.Product(stacked.left.double(), stacked.right.double()))
    assert torch.allclose(s.double(), slow[1], rtol=1e-5)
    assert torch.allclose((u * s @ vh).double(), stacked.dense().double(), atol=1e-4)
    assert torch.allclose(u.T @ u, torch.eye(len(s)), atol=1e-5)
    assert torch.allclose(vh @ vh.T, torch.eye(len(s)), atol=1e-5)
    for rank in (1, 2, 3):
        ideal = (slow[0][:, :rank] * slow[1][:rank]) @ slow[2][:rank]
        assert torch.allclose(product.truncate(stacked, rank).dense().double(), ideal, atol=1e-4)


def test_twins_and_zeros_take_the_slow_way() -> None:
    twin = _float(_module(1, 3, 6.0, out=40, inner=30))
    stacked = product.stack([twin, twin], [1.0, 2.0])
    assert product._svd_by_gram(stacked) is None
    assert torch.allclose(product.truncate(stacked, 3).dense(), twin.delta(), atol=1e-4)
    zero = product.Product(torch.zeros(5, 2), torch.randn(2, 4))
    assert not product.truncate(zero, 2).dense().any()
    wide = product.stack([_float(_module(i, 4, 4.0)) for i in range(4)], [1.0] * 4)
    assert product._svd_by_gram(wide) is None
    assert torch.allclose(product.truncate(wide, 5).dense(), wide.dense(), atol=1e-4)


def test_the_norm_of_a_small_difference_is_right() -> None:
    one = product.stack(MIXED, WEIGHTS)
    near = product.Product(one.left * (1 + 1e-9), one.right)
    gap = product.norm(product.total(one, product.minus(near)))
    assert gap == pytest.approx(1e-9 * float(one.dense().norm()), rel=1e-3)


def test_the_gram_of_updates_is_the_dense_one() -> None:
    sets = [{"x": product.of(m), "y": product.of(m)} for m in MIXED]
    dense = torch.stack([2**0.5 * m.delta().flatten() for m in MIXED])
    assert torch.allclose(product.gram(sets), dense @ dense.T, atol=1e-10)


LARGE = {f"l{i}.q": (16, 96, 80) for i in range(2)}


def _walked(relative: float, count: int = 5) -> tuple[dict[str, LoraModule], list[dict[str, LoraModule]]]:
    """Return float32 factors, and some that moved a little away from them; the last moved ten times as far."""
    generator = torch.Generator().manual_seed(0)
    start = {
        p: LoraModule(
            torch.randn(r, k, generator=generator) * 0.1, torch.randn(o, r, generator=generator) * 0.1, 2.5 * r
        )
        for p, (r, o, k) in LARGE.items()
    }

    def step(module: LoraModule, size: float) -> LoraModule:
        moved = [t + size * 0.1 * torch.randn(t.shape, generator=generator) for t in (module.a, module.b)]
        return LoraModule(moved[0], moved[1], module.alpha)

    sizes = [relative * (10 if i == count - 1 else 1) for i in range(count)]
    return start, [{p: step(m, size) for p, m in start.items()} for size in sizes]


@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-4, 1e-5, 1e-6])
def test_norms_and_inner_products_of_small_changes_keep_their_digits(relative: float) -> None:
    """Dense matrices in float64 are the oracle; in float32, four terms each would cancel."""
    start, moved = _walked(relative)
    gaps = [
        {p: product.total(product.precise(m), product.minus(product.precise(start[p]))) for p, m in u.items()}
        for u in moved
    ]

    def dense(adapter: dict[str, LoraModule]) -> torch.Tensor:
        return torch.cat([(m.scale * m.b.double() @ m.a.double()).flatten() for m in adapter.values()])

    rows = torch.stack([dense(u) - dense(start) for u in moved])
    want = rows @ rows.T
    size = want.diag().sqrt()
    got = product.gram(gaps)
    assert float(((got - want).abs() / (size[:, None] * size[None])).max()) < 1e-8
    assert float(got.diag().min()) > 0
    for gap, row in zip(gaps, rows, strict=True):
        norms = [product.norm(g) for g in gap.values()]
        assert sum(n**2 for n in norms) ** 0.5 == pytest.approx(float(row.norm()), rel=1e-7)


def test_the_balanced_factors_have_equal_norms_and_do_not_depend_on_how_the_delta_was_split() -> None:
    one = MIXED[1]
    turned = product.regauge(one, torch.tensor([[1e3, 2.0, 0.0], [0.0, 1e-3, 1.0], [1.0, 0.0, 5.0]]).double())
    for module in (one, turned, LoraModule(one.a * 0, one.b, one.alpha), MIXED[0]):
        got = product.balanced(module)
        assert torch.allclose(got.delta(), module.delta(), atol=1e-9)
        assert torch.allclose(got.b.norm(dim=0), got.a.norm(dim=1), atol=1e-9)
        assert got.a.shape == module.a.shape
    assert torch.allclose(product.balanced(one).b.abs(), product.balanced(turned).b.abs(), atol=1e-6)
    tall = LoraModule(torch.randn(4, 2).double(), torch.randn(3, 4).double(), 8.0)
    assert torch.allclose(product.balanced(tall).delta(), tall.delta(), atol=1e-12)
