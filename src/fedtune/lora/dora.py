"""The exact map between DoRA and an aggregation of LoRA factors.

DoRA's weight is W' = m / ||W0 + s B A|| * (W0 + s B A), row by row (arXiv 2402.09353). With D = m / ||W0 + s B A|| it
is D * W0 + s (D * B) A, linear in (D, (D * B) A). A client therefore sends D, D * B and A; with D_mean = sum_i w_i
D_i, any exact combination of the factors (D_i * B_i) / D_mean, A_i gives factors whose DoRA weight with D_mean is the
mean of the clients' weights - the server needs no W0. What a client starts from is m = D_mean * ||W0 + s B A||.

On the wire and on the server `magnitude` stands for D.

No client can make a row vanish, or take it over: in one round a magnitude, relative or DoRA's own, changes by no more
than a factor of two. What a client sends is clamped to that, and what lies outside is not accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.lora.algebra import weighted_mean
from fedtune.lora.state import AdapterState
from fedtune.names import PREFIX, B, M

if TYPE_CHECKING:
    from torch import Tensor

# how far a magnitude may move in one round, either way, and how far all rounds together may move it: so near to 1 that
# float32 divides by a relative magnitude without loss
FACTOR = 2.0
SMALLEST, LARGEST = 1e-3, 1e3
# a mean of relative magnitudes below is one that nothing can be divided by
VANISHING = 1e-6


def row_norms(weight: Tensor, delta: Tensor) -> Tensor:
    """Return ||W0 + dW|| of each output row [out]; both [out, in]."""
    norms: Tensor = (weight.to(delta.dtype) + delta).norm(dim=1)
    return norms


def _paths(tensors: Mapping[str, Tensor]) -> list[str]:
    return [n.removeprefix(PREFIX).removesuffix(M) for n in tensors if n.endswith(M)]


def interval(was: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest magnitude [out] that one round may make of those it started from [out].

    One that is beyond `SMALLEST` or `LARGEST` already may stay where it is.
    """
    low = torch.minimum(was, (was / FACTOR).clamp(min=SMALLEST))
    return low, torch.maximum(was, (was * FACTOR).clamp(max=LARGEST))


def clamped(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with every magnitude inside the interval of that in `start`; NaN stays NaN."""
    return {n: t.clamp(*interval(start[n])) if n.endswith(M) else t for n, t in tensors.items()}


def outside(tensors: Mapping[str, Tensor], adapter: AdapterState) -> str:
    """Say which magnitude is outside the interval of the adapter's, or return an empty string."""
    for path, module in adapter.items():
        sent = tensors.get(PREFIX + path + M)
        if sent is None or module.magnitude is None:
            continue
        low, high = interval(module.magnitude)
        outside = torch.nonzero(~((low <= sent) & (sent <= high))).flatten()  # NaN as well
        if len(outside):
            row = int(outside[0])
            got, least, most = float(sent[row]), float(low[row]), float(high[row])
            return f"{path}: row {row} has a magnitude of {got:.3g}; from {least:.3g} to {most:.3g} is taken"
    return ""


def to_wire(
    payload: Mapping[str, Tensor], norms: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a client's payload with (m, B) replaced by (D, D * B).

    Args:
        payload: at least B and m of each layer.
        norms: by layer, ||W0 + s B A|| of the trained factors.
        start: what the client was sent; D stays inside the interval of D there.
    """
    sent = dict(payload)
    for path in _paths(payload):
        name = PREFIX + path + M
        relative = payload[name] / norms[path].to(payload[name].dtype)
        if start is not None:
            relative = relative.clamp(*interval(start[name]))
        sent[name] = relative
        sent[PREFIX + path + B] = payload[PREFIX + path + B] * relative[:, None]
    return sent


def from_wire(sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a client sent with D * B replaced by B."""
    plain = {PREFIX + p + B: sent[PREFIX + p + B] / sent[PREFIX + p + M][:, None] for p in _paths(sent)}
    return {**sent, **plain}


def to_magnitudes(tensors: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors with D replaced by m = D * ||W0 + s B A||."""
    changed = {PREFIX + p + M: tensors[PREFIX + p + M] * norms[p].to(tensors[PREFIX + p + M].dtype) for p in norms}
    return {**tensors, **changed}


def unit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a fresh adapter's tensors with m = ||W0|| replaced by D = 1."""
    return {n: t.new_ones(t.shape) if n.endswith(M) else t for n, t in tensors.items()}


def divided(
    updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the updates with B = (D_i * B_i) / D_mean, and D_mean by name.

    Raises:
        ValueError: D_mean comes too near to 0 somewhere, or is not a number.
    """
    means = weighted_mean(({n: t for n, t in u.items() if n.endswith(M)} for u in updates), weights)
    low = [n for n, t in means.items() if not float(t.min()) >= VANISHING]
    if low:
        raise ValueError(f"{low[0]}: the mean relative magnitude falls to {float(means[low[0]].min()):.2g}")
    names = {PREFIX + path + B: PREFIX + path + M for path in _paths(means)}
    changed = [{**u, **means, **{b: u[b] / means[m][:, None] for b, m in names.items()}} for u in updates]
    return changed, means
