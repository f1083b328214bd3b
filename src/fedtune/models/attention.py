"""Several texts in one unpadded row: attention is cut at their borders, so no token ever sees a neighbour's.

Registered with transformers as the attention `fedtune_packed`; outside a packed pass it is plain SDPA. Within one,
texts of similar length attend together in dense batches, or, on a GPU in 16 bits, all at once in a kernel for that.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.models import sides
from fedtune.models.packing import Batch, PackedRow, Plan, pack

NAME = "fedtune_packed"
_packing: ContextVar[bool] = ContextVar("packing", default=False)


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


def spread(x: Tensor, plan: Plan) -> Tensor:
    """Return the rows of `x` as a plan arranges them; where padding stands, a row of the same text stands for it."""
    if plan.there is None or plan.back is None:
        return x
    moved: Tensor = _Arrange.apply(x, plan.there, plan.back, None)  # type: ignore[no-untyped-call]
    return moved


def gathered(x: Tensor, plan: Plan) -> Tensor:
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
    weights = (
        scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32).to(query.dtype)
    )
    return weights @ value


def _dense(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, mask: Tensor | None, softcap: float
) -> Tensor:
    """Attend in a batch of texts, [texts, heads, tokens, head_dim]."""
    if softcap:
        return _capped(query, key, value, scale, softcap, mask)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _texts(states: Tensor, plan: Plan) -> list[Tensor]:
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


def _in_batches(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, dropout: float, extra: dict[str, Any]
) -> Tensor:
    """Attend text by text in dense batches: [tokens, heads, head_dim] each, and so the result."""
    window, softcap = extra.get("sliding_window"), float(extra.get("softcap") or 0.0)
    queries, keys, values = (_texts(states, plan) for states in (query, key, value))
    made = []
    for batch, *own in zip(plan.batches, queries, keys, values, strict=True):
        heads = (own[0], _seen(keys, own[1], batch), _seen(values, own[2], batch))
        q, k, v = (states.transpose(1, 2) for states in heads)
        attended = _dense(q, k, v, scale, dropout, plan.mask(batch, window), softcap)
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


def _at_once(
    kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None
) -> Tensor:
    """Attend in all texts by one call: [tokens, heads, head_dim] each, and so the result.

    The kernel aligns its causal mask at the end, so queries behind a shared prefix see all of it.
    """
    lengths = plan.ragged
    if lengths.tokens is not None:
        key, value = key.index_select(0, lengths.tokens), value.index_select(0, lengths.tokens)
    made: Tensor = kernel(
        query,
        key,
        value,
        lengths.queries,
        lengths.keys,
        *lengths.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return made


def _fits_kernel(query: Tensor, dropout: float, extra: dict[str, Any]) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and dropout == 0 and not extra.get("softcap")


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: Plan | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attend inside each text. query [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if plan is None and extra.get("softcap"):
        return _capped(query, key, value, scale, float(extra["softcap"]), attention_mask).transpose(1, 2), None
    if plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **extra
        )
        return plain
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    kernel = varlen_kernel() if _fits_kernel(query, dropout, extra) else None
    if kernel is not None:
        return _at_once(kernel, rows[0], rows[1], rows[2], plan, scale, extra.get("sliding_window"))[None], None
    return _in_batches(rows[0], rows[1], rows[2], plan, scale, dropout, extra)[None], None


def _mask(*args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return None if _packing.get() else sdpa_mask(*args, **kwargs)


def register() -> str:
    """Make the attention known to transformers (again and again is fine) and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


@contextlib.contextmanager
def _packed_pass() -> Iterator[None]:
    token = _packing.set(True)
    try:
        yield
    finally:
        _packing.reset(token)


def inner(model: Any) -> Any:
    """Return the model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_row(model: Any, row: PackedRow, **options: Any) -> Any:
    """Run a packed row through a causal language model loaded with this attention, bare or wrapped by PEFT."""
    device = next(model.parameters()).device
    with _packed_pass():
        return model(
            input_ids=torch.tensor([row.ids], device=device),
            position_ids=torch.tensor([row.positions], device=device),
            plan=Plan(row.spans, device),
            use_cache=False,
            **options,
        )


def text_features(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return the base model's last hidden state at the end of each text [texts, hidden], adapters left out."""
    row = pack(texts)
    mixer = sides.of(model)
    with torch.no_grad(), contextlib.ExitStack() as during:
        if mixer is not None:
            during.enter_context(model.disable_adapter())
            during.enter_context(mixer.off())
        output = run_row(model, row, output_hidden_states=True)
    last: Tensor = output.hidden_states[-1]
    return last[0, torch.tensor([span.end - 1 for span in row.spans], device=last.device)]


def row_logits(model: Any, row: PackedRow, keep: Sequence[int]) -> Tensor:
    """Run a packed row and return the logits [len(keep), vocabulary] at places in the texts joined end to end."""
    device = next(model.parameters()).device
    index = torch.tensor([row.place[i] for i in keep], dtype=torch.long, device=device)
    direct = "logits_to_keep" in inspect.signature(inner(model).forward).parameters
    output = run_row(model, row, **({"logits_to_keep": index} if direct else {}))
    logits: Tensor = output.logits[0]
    return logits if direct else logits[index]


@contextlib.contextmanager
def text_weights(model: Any, texts: Sequence[Sequence[int]]) -> Iterator[bool]:
    """Weigh a second adapter for each text of a pass, where there is one and its weight depends on the text.

    Yields whether texts may share what they begin with: not if it differs between them.
    """
    mixer = sides.of(model)
    if mixer is None or not mixer.per_text:
        yield True
        return
    lengths = torch.tensor([len(t) for t in texts], device=next(model.parameters()).device)
    with mixer.mixed(lambda: text_features(model, texts), lambda w: w.repeat_interleave(lengths)[None, :, None]):
        yield False


def packed_logits(
    model: Any, texts: Sequence[Sequence[int]], keep: Sequence[int], *, share_prefix: bool = False
) -> Tensor:
    """Run several texts through the model as one row, without padding.

    Args:
        model: a causal language model loaded with this attention, bare or wrapped by PEFT.
        texts: token ids of each text.
        keep: positions in the joined texts whose logits are wanted; the head is computed for no other.
        share_prefix: see `pack`.

    Returns:
        Logits [len(keep), vocabulary].
    """
    with text_weights(model, texts) as shareable:
        return row_logits(model, pack(texts, share_prefix=share_prefix and shareable), keep)
