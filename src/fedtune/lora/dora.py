"""The exact map between DoRA and an aggregation of LoRA factors.

DoRA's weight is W' = m / ||W0 + s B A|| * (W0 + s B A), row by row (arXiv 2402.09353). With D = m / ||W0 + s B A|| it
is D * W0 + s (D * B) A, linear in (D, (D * B) A). A client therefore sends D, D * B and A; with D_mean = sum_i w_i
D_i, any exact combination of the factors (D_i * B_i) / D_mean, A_i gives factors whose DoRA weight with D_mean is the
mean of the clients' weights - the server needs no W0. What a client starts from is m = D_mean * ||W0 + s B A||.

On the wire and on the server `magnitude` stands for D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedtune.lora.algebra import weighted_mean
from fedtune.lora.state import PREFIX, AdapterState, B, M

SMALLEST = 1e-6


def row_norms(weight: Tensor, delta: Tensor) -> Tensor:
    """Return ||W0 + dW|| of each output row [out]; both [out, in]."""
    norms: Tensor = (weight.to(delta.dtype) + delta).norm(dim=1)
    return norms


def _paths(tensors: Mapping[str, Tensor]) -> list[str]:
    return [n.removeprefix(PREFIX).removesuffix(M) for n in tensors if n.endswith(M)]


def to_wire(payload: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a client's payload with (m, B) replaced by (D, D * B).

    Args:
        payload: at least B and m of each layer.
        norms: by layer, ||W0 + s B A|| of the trained factors.
    """
    sent = dict(payload)
    for path in _paths(payload):
        relative = payload[PREFIX + path + M] / norms[path].to(payload[PREFIX + path + M].dtype)
        sent[PREFIX + path + M] = relative
        sent[PREFIX + path + B] = payload[PREFIX + path + B] * relative[:, None]
    return sent


def on_the_wire(tensors: Mapping[str, Tensor], adapter: AdapterState) -> dict[str, Tensor]:
    """Return tensors of the server's adapter as a client would send them: B as D * B, by the adapter's own D."""
    sent = dict(tensors)
    for path, module in adapter.items():
        name = PREFIX + path + B
        if name in sent and module.magnitude is not None:
            sent[name] = sent[name] * module.magnitude[:, None]
    return sent


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
        ValueError: D_mean comes too near to 0 somewhere.
    """
    means = weighted_mean(({n: t for n, t in u.items() if n.endswith(M)} for u in updates), weights)
    low = [n for n, t in means.items() if float(t.min()) < SMALLEST]
    if low:
        raise ValueError(f"{low[0]}: the mean relative magnitude falls to {float(means[low[0]].min()):.2g}")
    changed = []
    for update in updates:
        new = dict(update)
        for path in _paths(update):
            new[PREFIX + path + B] = update[PREFIX + path + B] / means[PREFIX + path + M][:, None]
            new[PREFIX + path + M] = means[PREFIX + path + M]
        changed.append(new)
    return changed, means
