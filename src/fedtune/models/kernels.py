"""Attention over the texts of one unpadded row: in dense batches, or at once in a kernel for texts end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.models.packing import Batch, PackingPlan


class _Arrange(torch.autograd.Function):
    """Take rows of `x` in another order; and in the backward pass back again, rows of zeros at `pads`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, pads: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, pads)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back, pads = ctx.saved_tensors
        moved = grad.index_select(0, back)
        return moved if pads is None else moved.index_fill_(0, pads, 0.0), None, None, None


def spread(x: Tensor, plan: PackingPlan) -> Tensor:
    """Return the rows of `x` as a plan arranges them; where padding stands, a row of the same text stands for it."""
    if plan.there is None or plan.back is None:
        return x
    moved: Tensor = _Arrange.apply(x, plan.there, plan.back, None)  # type: ignore[no-untyped-call]
    return moved


def gathered(x: Tensor, plan: PackingPlan) -> Tensor:
    """Return arranged rows in the order of the tokens, without padding, whose gradient is zero."""
    if plan.there is None or plan.back is None:
        return x
    moved: Tensor = _Arrange.apply(x, plan.back, plan.there, plan.pads)  # type: ignore[no-untyped-call]
    return moved


def _capped(query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float, mask: Tensor | None) -> Tensor:
    """Attention with soft-capped logits (Gemma 2), which SDPA cannot do."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / cap) * cap
    queries, keys = query.shape[-2], key.shape[-2]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    allowed = causal if mask is None else mask
    # not -inf: a row of padding sees nothing, and its NaN would reach what other rows see of it
    hidden = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~allowed, hidden).softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


def _texts(states: Tensor, plan: PackingPlan) -> list[Tensor]:
    """Return each batch's texts [texts, tokens, heads, head_dim].

    Split, not sliced: the gradients of slices would be tables of zeros, one a batch, that are added up.
    """
    parts = torch.split(spread(states, plan), plan.sizes)
    return [part.view(b.count, b.length, *part.shape[1:]) for part, b in zip(parts, plan.batches, strict=True)]


def _seen(texts: Sequence[Tensor], own: Tensor, batch: Batch) -> Tensor:
    """Return a batch's texts behind the prefix they share, if they share one."""
    if batch.behind is None:
        return own
    return torch.cat([texts[batch.behind].expand(batch.count, -1, -1, -1), own], dim=1)


def in_batches(
    query: Tensor, key: Tensor, value: Tensor, plan: PackingPlan, scale: float, dropout: float, extra: dict[str, Any]
) -> Tensor:
    """Attend text by text in dense batches: [tokens, heads, head_dim] each, and so the result."""
    window, softcap = extra.get("sliding_window"), float(extra.get("softcap") or 0.0)
    queries, keys, values = (_texts(states, plan) for states in (query, key, value))
    made = []
    for batch, *own in zip(plan.batches, queries, keys, values, strict=True):
        heads = (own[0], _seen(keys, own[1], batch), _seen(values, own[2], batch))
        q, k, v = (states.transpose(1, 2) for states in heads)
        mask, grouped = plan.mask(batch, window), q.shape[1] != k.shape[1]
        if softcap:
            attended = _capped(q, k, v, scale, softcap, mask)
        else:
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=grouped
            )
        made.append(attended.transpose(1, 2).flatten(0, 1))
    return gathered(torch.cat(made) if len(made) > 1 else made[0], plan)


def varlen_kernel() -> Callable[..., Any] | None:
    """Return torch's variable-length attention (flash attention, CUDA), where this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Callable[..., Any] = varlen_attn
    return found


def at_once(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackingPlan,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend in all texts by one call: [tokens, heads, head_dim] each, and so the result.

    The kernel aligns its causal mask at the end, so queries behind a shared prefix see all of it.
    """
    lengths, left = plan.ragged, -1 if window is None else window - 1
    if lengths.tokens is not None:
        key, value = key.index_select(0, lengths.tokens), value.index_select(0, lengths.tokens)
    texts, how = (lengths.queries, lengths.keys, *lengths.longest), {"scale": scale, "window_size": (left, 0)}
    made: Tensor = kernel(query, key, value, *texts, **how, enable_gqa=query.shape[1] != key.shape[1])
    return made
