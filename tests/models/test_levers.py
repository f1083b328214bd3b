"""The parts that make a pass cheap, each against the plain way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from fedtune.config import Settings
from fedtune.config.schema import ModelSettings
from fedtune.models import attention, head, kernels, packing, rms_norm
from fedtune.models.adapter import attach
from fedtune.models.dropout import KeyedDropout, Keys, token_keys
from fedtune.models.load import load
from fedtune.models.merge import foldable, folded
from fedtune.models.packing import PackingPlan, Span, batches, join, pack
from tests.tiny import make_folder, make_model

CPU = torch.device("cpu")


def naive(q: Tensor, k: Tensor, v: Tensor, spans: list[Span], window: int | None) -> Tensor:
    """Attention by one dense mask over the whole row."""
    total = q.shape[0]
    seen = torch.zeros(total, total, dtype=torch.bool)
    for span in spans:
        keys = [*range(*span.prefix), *range(span.start, span.end)]
        for place in range(span.start, span.end):
            row = [t for t in keys if t <= place]
            seen[place, row if window is None else row[-window:]] = True
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)


def ragged_kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, **how: Any) -> Tensor:
    """What the GPU's kernel for texts of different lengths is documented to do: causal, aligned at the end."""
    left, right = how["window_size"]
    assert right == 0
    assert (longest[0], longest[1]) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    parts = []
    for i in range(len(cu_q) - 1):
        mine, seen = q[cu_q[i] : cu_q[i + 1]], slice(cu_k[i], cu_k[i + 1])
        n, m = len(mine), int(cu_k[i + 1] - cu_k[i])
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        if left >= 0:
            mask &= ~torch.ones(n, m, dtype=torch.bool).tril(m - n - left - 1)
        heads = [t.transpose(0, 1)[None] for t in (mine, k[seen], v[seen])]
        made = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=how["scale"], enable_gqa=how["enable_gqa"])
        parts.append(made[0].transpose(0, 1))
    return torch.cat(parts)


@examples(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    prefix=st.sampled_from([0, 9]),
    window=st.sampled_from([None, 7]),
    rows=st.integers(1, 2),
    call=st.sampled_from([0, 300, 2**20]),
)
def test_attention_in_batches_is_attention_by_one_mask(
    lengths: list[int], prefix: int, window: int | None, rows: int, call: int
) -> None:
    texts = [[1] * prefix + list(range(10 + 50 * i, 10 + 50 * i + n)) for i, n in enumerate(lengths)]
    row = join([pack(texts, share_prefix=True)] * rows)
    spans = list(row.spans)
    total = len(row.ids)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packing.CALL, "cpu", call)
        plan = PackingPlan(spans, CPU)
    want = naive(q, k, v, spans, window)
    extra = {"sliding_window": window}
    got = kernels.in_batches(q, k, v, plan, 8**-0.5, 0.0, extra)
    at_once = kernels.at_once(ragged_kernel, q, k, v, plan, 8**-0.5, window)
    assert torch.allclose(got, want, atol=1e-10)
    assert torch.allclose(at_once, want, atol=1e-10)
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (want, got, at_once)]
    for plain, ours, fast in zip(*grads, strict=True):
        assert torch.allclose(plain, ours, atol=1e-10)
        assert torch.allclose(plain, fast, atol=1e-10)


def test_texts_are_batched_where_that_is_cheaper_than_a_call() -> None:
    spans = [Span(0, 10), Span(10, 22), Span(22, 300), Span(300, 309)]
    assert [[s.length for s in group] for group in batches(spans, 500)] == [[278], [12, 10, 9]]
    assert len(batches(spans, 0)) == 4
    assert len(batches(spans, 2**20)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fused_norm_is_the_models_own(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    for norm in (m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    own = model.model.norm.requires_grad_(False)
    ours = rms_norm._fused(own)
    assert ours is not None
    x = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 5, 32, dtype=dtype)
    (one,), (two,) = (torch.autograd.grad((f(x) * weight).sum(), x) for f in (own, ours))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(own(x), ours(x), atol=tolerance)
    assert torch.allclose(one, two, atol=tolerance)
    assert rms_norm.fuse(model) == 5
    assert rms_norm.fuse(model) == 0


def test_a_norm_of_another_kind_stays() -> None:
    class OneMoreRMSNorm(nn.Module):
        """As Gemma's: the weight is added to one."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return (1 + self.weight) * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    model = nn.Sequential(OneMoreRMSNorm(), nn.LayerNorm(8))
    assert rms_norm.fuse(model) == 0


@pytest.mark.parametrize("chunk", [1, 700, 2**22])
@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_in_chunks_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk: int, bias: bool) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = 3 * torch.randn(50, 8, generator=generator, dtype=torch.float64)
    added = torch.randn(50, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(0, 50, (13,), generator=generator)
    shares = torch.rand(13, generator=generator, dtype=torch.float64)
    plain = F.cross_entropy(F.linear(hidden, weight, added), targets, reduction="none")
    (want,) = torch.autograd.grad((plain * shares).sum().square(), hidden, retain_graph=True)
    for expected in (shares, torch.full_like(shares, 0.125)):
        each = head.linear_losses(hidden, weight, added, targets, expected)
        assert torch.allclose(each, plain, atol=1e-12)
        (made,) = torch.autograd.grad((each * shares).sum().square(), hidden)
        assert torch.allclose(made, want, rtol=1e-12)


def test_in_16_bits_a_derivative_that_is_known_late_is_multiplied_in_32() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 64, generator=generator).bfloat16()
    targets, late = torch.randint(0, 50, (13,), generator=generator), torch.rand(13, generator=generator)
    ones = torch.ones(13)
    (unit,) = torch.autograd.grad(head.linear_losses(hidden, weight, None, targets, ones).sum(), hidden)
    (made,) = torch.autograd.grad((head.linear_losses(hidden, weight, None, targets, ones) * late).sum(), hidden)
    assert torch.equal(made, (unit.float() * late[:, None]).bfloat16())


def test_a_head_that_does_more_than_multiply_is_seen() -> None:
    plain, capped = make_model().requires_grad_(False), make_model().requires_grad_(False)
    forward = capped.forward

    def softcapped(*words: Any, **named: Any) -> Any:
        out = forward(*words, **named)
        out.logits = torch.tanh(out.logits / 2) * 2 + 1
        return out

    capped.forward = softcapped
    assert head.has_plain_head(plain)
    assert not head.has_plain_head(capped)


def test_dropout_keeps_its_share_and_scale_and_nothing_repeats() -> None:
    keys = Keys()
    one, two = KeyedDropout(0.25, 0, keys), KeyedDropout(0.25, 1, keys)
    x = torch.ones(1, 600, 64)
    first = token_keys([11], [0], [[300, 300]], CPU)
    with keys.of(first):
        a, b, again = one(x), two(x), one(x)
    with keys.of(token_keys([12], [0], [[300, 300]], CPU)):
        other = one(x)
    assert torch.equal(a, again)
    assert float((a == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(a.mean()) == pytest.approx(1.0, abs=0.02)
    assert sorted(a.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    for same in (b, other, a.roll(1, 1), a.roll(1, 2), torch.cat([a[:, 300:], a[:, :300]], 1)):
        both = float(((a == 0) & (same == 0)).float().mean())
        assert both == pytest.approx(0.0625, abs=0.01), "as often as two independent masks"
    assert torch.equal(one(x), x), "nothing is dropped outside a keyed pass"
    one.eval()
    with keys.of(first):
        assert torch.equal(one(x), x)


def test_a_tokens_mask_does_not_depend_on_what_stands_beside_it() -> None:
    whole = token_keys([5, 9], [0, 0], [[4, 3], [2]], CPU)
    assert torch.equal(whole[4:7], token_keys([5], [1], [[3]], CPU))
    assert torch.equal(whole[7:], token_keys([9], [0], [[2]], CPU))
    assert len(set(whole.tolist())) == 9


@pytest.mark.parametrize("kind", [{}, {"rslora": True}])
def test_a_folded_adapter_is_the_adapter_and_the_base_comes_back(
    tiny_folder: Path, settings: Callable[..., Settings], kind: dict[str, Any]
) -> None:
    config = settings(lora__alpha=16.0).config.lora.model_copy(update=kind)
    adapted = attach(load(ModelSettings(name=str(tiny_folder))), config, 0)
    for slot in adapted.slots.values():
        nn.init.normal_(slot, std=0.3)
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters()}
    texts, keep = [list(range(5, 30)), list(range(40, 52))], list(range(37))
    with torch.inference_mode():
        plain = attention.packed_logits(adapted.model, texts, keep)
        with folded(adapted) as done:
            assert done
            inside = attention.packed_logits(adapted.model, texts, keep)
            assert not torch.equal(inside, plain)
        with adapted.model.disable_adapter():
            base = attention.packed_logits(adapted.model, texts, keep)
    assert torch.allclose(inside, plain, atol=1e-4)
    assert not torch.allclose(base, plain, atol=1e-2)
    assert all(torch.equal(p, before[n]) for n, p in adapted.model.named_parameters())


def test_what_would_lose_more_than_rounding_is_not_folded(tiny_folder: Path, settings: Callable[..., Settings]) -> None:
    half = load(ModelSettings(name=str(tiny_folder), dtype="bfloat16"))
    lora = settings().config.lora
    assert not foldable(attach(half, lora, 0))
    assert not foldable(attach(load(ModelSettings(name=str(tiny_folder))), lora.model_copy(update={"dora": True}), 0))
    beside = attach(load(ModelSettings(name=str(tiny_folder))), lora, 0)
    assert foldable(beside)
    path = next(iter(beside.layers))
    sides = {
        f"base_model.model.{path}.base_A.weight": torch.ones(1, 32),
        f"base_model.model.{path}.base_B.weight": torch.ones(32, 1),
    }
    beside.sides.load(sides, beside.device)
    assert not foldable(beside)


@pytest.mark.parametrize("targets", [("lm_head",), ("lm_head", "q_proj"), ("all-linear",)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_that_two_layers_share_is_never_changed_through_one(
    tmp_path: Path, settings: Callable[..., Settings], targets: tuple[str, ...], tied: bool
) -> None:
    """A head tied to the embedding: folded into it, the adapter would change the embedding too."""
    model = load(ModelSettings(name=str(make_folder(tmp_path / "model", tie_word_embeddings=tied))))
    adapted = attach(model, settings().config.lora.model_copy(update={"target_modules": targets}), 0)
    for slot in adapted.slots.values():
        nn.init.normal_(slot, std=0.3)
    texts, keep = [list(range(5, 30))], list(range(25))
    with torch.inference_mode():
        plain = attention.packed_logits(adapted.model, texts, keep)
        with folded(adapted) as done:
            inside = attention.packed_logits(adapted.model, texts, keep)
    assert done == (not tied or "lm_head" not in adapted.layers)
    assert torch.allclose(inside, plain, atol=1e-3)


def test_a_layer_that_stands_in_two_places_is_not_folded(tiny_folder: Path, settings: Callable[..., Settings]) -> None:
    model = load(ModelSettings(name=str(tiny_folder)))
    layers = model.model.model.layers
    lora = settings().config.lora.model_copy(update={"target_modules": ("layers.0.mlp.up_proj",)})
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    assert not foldable(attach(model, lora, 0))
    layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(64, 32))
    assert foldable(attach(load(ModelSettings(name=str(tiny_folder))), lora, 0))


def test_a_head_that_was_plain_before_an_adapter_came_is_tried_anew(
    tiny_folder: Path, settings: Callable[..., Settings]
) -> None:
    model = load(ModelSettings(name=str(tiny_folder)))
    assert head.has_plain_head(model.model)
    adapted = attach(model, settings().config.lora.model_copy(update={"target_modules": ("lm_head",)}), 0)
    assert not head.has_plain_head(adapted.model)
