"""The packed pass as an attention of transformers' own interface, which a model has only during such a pass.

At all other times a model computes with the attention that transformers chose for it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedtune.models.kernels import at_once, in_batches, varlen_kernel
from fedtune.models.packing import PackedRow, PackingPlan
from fedtune.types import ModelError

T = TypeVar("T")
NAME = "fedtune_packed"
_CONFIGS = "fedtune_configs"
# tensors that layers hand to every attention, and that say nothing which the plan does not
KNOWN = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}
# the widest heads of the kernel for texts of different lengths
WIDEST = 256


@dataclass
class Watch:
    """What the layers of a model asked of a packed pass.

    Attributes:
        calls: of the attention.
        masks: windows of the masks that were asked for; masks themselves are never made.
        windows: that were given to the attention, which applies them.
    """

    calls: int = 0
    masks: set[int] = field(default_factory=set)
    windows: set[int] = field(default_factory=set)


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


def _refused(module: Any, mask: Any, plan: PackingPlan | None, extra: dict[str, Any]) -> str:
    """Return what a layer asks of its attention that this one cannot do; empty if nothing."""
    unknown = sorted(n for n, value in extra.items() if isinstance(value, Tensor) and n not in KNOWN)
    if unknown:
        return f"its attention takes {', '.join(unknown)}"
    if plan is None:
        return "its layers do not hand on what is said of a row"
    if mask is not None:
        return "it makes an attention mask of its own"
    causal = extra.get("is_causal")
    return "" if (getattr(module, "is_causal", True) if causal is None else causal) else "its attention is not causal"


def _fits_kernel(query: Tensor, value: Tensor, dropout: float, extra: dict[str, Any]) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = dropout == 0 and not extra.get("softcap") and query.shape[-1] == value.shape[-1] <= WIDEST
    return query.is_cuda and half and plain


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: PackingPlan | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attend inside each text. query [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
    window = extra.get("sliding_window")
    watch = _watch.get()
    if watch is not None:
        watch.calls += 1
        watch.windows |= {window} if window else set()
    refused = _refused(module, attention_mask, plan, extra)
    if refused or plan is None:
        raise ModelError(f"{type(module).__name__}: several texts in one row are not possible here: {refused}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    kernel = varlen_kernel() if _fits_kernel(query, value, dropout, extra) else None
    if kernel is not None:
        return at_once(kernel, rows[0], rows[1], rows[2], plan, scale, window)[None], None
    return in_batches(rows[0], rows[1], rows[2], plan, scale, dropout, extra)[None], None


def _mask(*args: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any) -> None:
    """Make no mask: the plan says who sees whom."""
    if use_vmap:
        raise ModelError("several texts in one row are not possible here: the model's mask is not a plain causal one")
    watch = _watch.get()
    if watch is not None and local_size:
        watch.masks.add(local_size)


@functools.cache
def register() -> str:
    """Make the attention known to transformers, once, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def inner(model: Any) -> Any:
    """Return the model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def remembered(model: Any, name: str, find: Callable[[], T]) -> T:
    """Return what is found out of a model once, and kept with it."""
    if not hasattr(model, name):
        setattr(model, name, find())
    known: T = getattr(model, name)
    return known


def _configs(base: Any) -> list[tuple[Any, str]]:
    """Return the configurations that a model's layers look at, with the attention transformers chose."""
    found = {id(m.config): m.config for m in base.modules() if hasattr(getattr(m, "config", None), "sub_configs")}
    return [(config, config._attn_implementation) for config in found.values()]


@contextlib.contextmanager
def attending(model: Any, *, packed: bool) -> Iterator[None]:
    """Let a model's layers attend text by text, or as transformers chose; may be nested.

    Layers that are computed again in the backward pass look at it then: it has to last until that is over.
    """
    base, name = inner(model), register()
    configs = remembered(base, _CONFIGS, lambda: _configs(base))
    before = [config._attn_implementation for config, _ in configs]
    try:
        for config, own in configs:
            config._attn_implementation = name if packed else own
        yield
    finally:
        for (config, _), value in zip(configs, before, strict=True):
            config._attn_implementation = value


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Yield what notes what a packed pass is asked."""
    watch = Watch()
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def packed_pass(model: Any, row: PackedRow, module: Any = None, **options: Any) -> Any:
    """Run a row through a model, or through a part of it; nothing is checked here."""
    device = next(model.parameters()).device
    with attending(model, packed=True):
        return (module or model)(
            input_ids=torch.tensor([row.ids], device=device),
            position_ids=torch.tensor([row.positions], device=device),
            plan=PackingPlan(row.spans, device),
            use_cache=False,
            **options,
        )


@functools.cache
def _takes_cache(forward: Callable[..., Any]) -> bool:
    """Tell whether the pass of a class of models has an option `use_cache`."""
    return "use_cache" in inspect.signature(forward).parameters


def plain_pass(model: Any, ids: Sequence[int], module: Any = None, **options: Any) -> Any:
    """Run one text alone through a model, or through a part of it, as transformers would."""
    device, run = next(model.parameters()).device, module or model
    cache = {"use_cache": False} if _takes_cache(type(inner(run)).forward) else {}
    with attending(model, packed=False):
        return run(input_ids=torch.tensor([list(ids)], device=device), **cache, **options)
