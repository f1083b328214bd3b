"""What methods share whose clients send sketches: sums of which only the directions are used.

The largest of them would choose the directions for everybody, so no client's counts for more than `sound.OUTLYING`
times the median of the round. Where none is larger nothing is changed. Where there is room for every client's
directions, all of them are taken, and no size counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.methods.sound import capped
from fedtune.methods.state import ClientUpdate

if TYPE_CHECKING:
    from torch import Tensor

# how much of a sketch, relative to its norm, may lie outside the directions a client has: far above rounding
SURPLUS = 1e-3


def evened(updates: Sequence[ClientUpdate], layer_of: Callable[[str], str]) -> list[ClientUpdate]:
    """Return the updates with each layer's sketches scaled down together where they are larger than the others'.

    Args:
        updates: of a round, with the same names.
        layer_of: the layer of a tensor's name.
    """
    changed = [dict(u.tensors) for u in updates]
    for layer in {layer_of(name) for name in changed[0]}:
        names = [n for n in changed[0] if layer_of(n) == layer]
        factors = [1.0] * len(changed)
        for name in names:
            norms = [float(t[name].double().norm()) for t in changed]
            own = zip(factors, norms, capped(norms), strict=True)
            factors = [min(f, most / norm) if most < norm else f for f, norm, most in own]
        for tensors, factor in zip(changed, factors, strict=True):
            if factor < 1:  # all of a layer's together: they are of one gradient
                tensors.update({n: tensors[n] * factor for n in names})
    return [replace(u, tensors=t) for u, t in zip(updates, changed, strict=True)]


def directions(sketch: Tensor, rank: int) -> tuple[Tensor, bool]:
    """Return an orthonormal basis of a sketch's main directions, and whether it has more than rounding beyond them.

    Args:
        sketch: [out, width].
        rank: how many directions it may have.

    Returns:
        float64 [out, at most rank], with zeros where the sketch has fewer directions; whether it exceeds the rank.
    """
    exact = sketch.double()
    tall = exact.shape[0] >= exact.shape[1]
    squares, found = torch.linalg.eigh(exact.T @ exact if tall else exact @ exact.T)  # ascending
    squares = squares.clamp(min=0)
    surplus = squares[: max(0, len(squares) - rank)].sum() > SURPLUS**2 * squares.sum()
    own = squares[-rank:] > len(squares) * torch.finfo(torch.float64).eps * squares[-1]
    main = found[:, -rank:] * own
    if tall:
        main = exact @ main / squares[-rank:].sqrt().where(own, 1.0)
    return main, bool(surplus)
