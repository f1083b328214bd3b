"""Several texts in one unpadded row: attention is cut at their borders, so no token ever sees a neighbour's.

Registered with transformers as the attention `fedtune_packed`; outside a packed pass it is plain SDPA.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.models import sides

NAME = "fedtune_packed"
MIN_PREFIX = 8
_packing: ContextVar[bool] = ContextVar("packing", default=False)


def _visible(length: int, before: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys each query sees, as bool [length, before + length]; None where plain causal will do.

    Args:
        length: queries of this text (or suffix).
        before: keys of a shared prefix that stand before them.
        window: of sliding-window attention.
    """
    if before == 0 and (window is None or length <= window):
        return None
    place = torch.arange(before, before + length, device=device)[:, None]
    key = torch.arange(before + length, device=device)[None]
    seen = key <= place
    return seen if window is None else seen & (key > place - window)


def _capped(query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float, mask: Tensor | None) -> Tensor:
    """Attention with soft-capped logits (Gemma 2), which SDPA cannot do."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / cap) * cap
    queries, keys = query.shape[-2], key.shape[-2]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    allowed = causal if mask is None else mask
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ value


def _one_text(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, extra: dict[str, Any]) -> Tensor:
    length, before = query.shape[-2], key.shape[-2] - query.shape[-2]
    mask = _visible(length, before, extra.get("sliding_window"), query.device)
    if extra.get("softcap"):
        return _capped(query, key, value, scale, float(extra["softcap"]), mask)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=grouped,
    )


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    borders: Sequence[int] | None = None,
    prefix: int = 0,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attend inside each text. query [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if borders is None and extra.get("softcap"):
        return _capped(query, key, value, scale, float(extra["softcap"]), attention_mask).transpose(1, 2), None
    if borders is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **extra
        )
        return plain

    def seen(states: Tensor, a: int, b: int) -> Tensor:
        own = states[:, :, a:b]
        return torch.cat([states[:, :, :prefix], own], dim=2) if prefix and a >= prefix else own

    texts = [
        _one_text(query[:, :, a:b], seen(key, a, b), seen(value, a, b), scale, dropout, extra)
        for a, b in pairwise(borders)
    ]
    return torch.cat(texts, dim=2).transpose(1, 2).contiguous(), None


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


@dataclass(frozen=True)
class PackedRow:
    """Several texts as one row.

    Attributes:
        ids, positions: of each token in the row.
        borders: where texts begin and end; with a prefix, the first stretch is the prefix itself.
        prefix: tokens shared by all texts, computed once; 0 for none.
        place: position in the texts joined end to end -> position in the row.
    """

    ids: list[int]
    positions: list[int]
    borders: tuple[int, ...]
    prefix: int
    place: list[int]


def _common(texts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all texts begin with, leaving each at least one of its own."""
    shortest = min(map(len, texts)) - 1
    return next((i for i in range(shortest) if len({t[i] for t in texts}) > 1), max(shortest, 0))


def pack(texts: Sequence[Sequence[int]], *, share_prefix: bool = False) -> PackedRow:
    """Lay texts out in one row.

    Args:
        texts: token ids, each at least one.
        share_prefix: compute what all texts begin with only once. Exact, gradients included, as long as
            nothing random (dropout) tells the copies apart.
    """
    common = _common(texts) if share_prefix and len(texts) > 1 else 0
    prefix = common if common >= MIN_PREFIX else 0
    ids, positions = list(texts[0][:prefix]), list(range(prefix))
    borders = [0, prefix] if prefix else [0]
    place: list[int] = []
    for text in texts:
        place += range(prefix)
        place += range(len(ids), len(ids) + len(text) - prefix)
        ids += text[prefix:]
        positions += range(prefix, len(text))
        borders.append(len(ids))
    return PackedRow(ids, positions, tuple(borders), prefix, place)


def text_features(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return the base model's last hidden state at the end of each text [texts, hidden], adapters left out."""
    device = next(model.parameters()).device
    row = pack(texts)
    mixer = sides.of(model)
    with torch.no_grad(), contextlib.ExitStack() as during:
        if mixer is not None:
            during.enter_context(model.disable_adapter())
            during.enter_context(mixer.off())
        during.enter_context(_packed_pass())
        output = model(
            input_ids=torch.tensor([row.ids], device=device),
            position_ids=torch.tensor([row.positions], device=device),
            borders=row.borders,
            prefix=0,
            use_cache=False,
            output_hidden_states=True,
        )
    ends = torch.tensor(row.borders[1:], device=device) - 1
    hidden: Tensor = output.hidden_states[-1][0, ends]
    return hidden


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
    device = next(model.parameters()).device
    mixer = sides.of(model)
    apart = mixer is not None and mixer.per_text  # then what is shared by two texts would differ between them
    row = pack(texts, share_prefix=share_prefix and not apart)
    index = torch.tensor([row.place[i] for i in keep], dtype=torch.long, device=device)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    direct = "logits_to_keep" in inspect.signature(inner.forward).parameters
    with contextlib.ExitStack() as during:
        if mixer is not None and apart:
            lengths = torch.tensor([len(t) for t in texts], device=device)
            during.enter_context(
                mixer.mixed(lambda: text_features(model, texts), lambda w: w.repeat_interleave(lengths)[None, :, None])
            )
        during.enter_context(_packed_pass())
        output = model(
            input_ids=torch.tensor([row.ids], device=device),
            position_ids=torch.tensor([row.positions], device=device),
            borders=row.borders,
            prefix=row.prefix,
            use_cache=False,
            **({"logits_to_keep": index} if direct else {}),
        )
    logits: Tensor = output.logits[0]
    return logits if direct else logits[index]
