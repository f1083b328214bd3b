"""Changes of the base model as low-rank side adapters, kept in float32 beside it and never folded into it.

Folding an update of relative size 1e-3 into bfloat16 weights loses most of it, into 4-bit weights all of it. What a
method moves into the base is therefore appended as a `Piece`; beyond a cap the pieces are compressed into one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedtune.lora import product
from fedtune.lora.product import Product
from fedtune.lora.state import AdapterState
from fedtune.names import BASE_A, BASE_B, PREFIX

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """What one round added to the base model: a product for each layer, and the round."""

    round: int
    products: Mapping[str, Product]


def append(base: Sequence[Piece], round_: int, products: Mapping[str, Product], cap: int = 0) -> tuple[Piece, ...]:
    """Return the pieces with one more; compressed into one where a layer's columns exceed the cap.

    Args:
        base: so far.
        round_: the round of the new piece, and of a compressed one.
        products: the new piece; empty products are left out.
        cap: most columns of a layer; 0, and more than the layer's own full rank, is that rank: nothing is lost.
    """
    new = {path: p for path, p in products.items() if p.inner}
    pieces = (*base, Piece(round_, new)) if new else tuple(base)
    joined = join(pieces)
    if not any(p.inner > min(p.full, cap or p.inner) for p in joined.values()):
        return pieces
    return (Piece(round_, {path: product.compressed(p, cap) for path, p in joined.items()}),)


def join(pieces: Sequence[Piece]) -> dict[str, Product]:
    """Return the sum of pieces: for each layer its products stacked."""
    paths = dict.fromkeys(path for piece in pieces for path in piece.products)
    return {p: product.total(*(piece.products[p] for piece in pieces if p in piece.products)) for p in paths}


def side_tensors(products: Mapping[str, Product]) -> dict[str, Tensor]:
    """Return side adapters under the names a model takes them by."""
    named = {PREFIX + path + BASE_A: p.right.contiguous() for path, p in products.items()}
    return {**named, **{PREFIX + path + BASE_B: p.left.contiguous() for path, p in products.items()}}


def from_side_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Product]:
    """Return the side adapters among tensors."""
    paths = [n.removeprefix(PREFIX).removesuffix(BASE_A) for n in tensors if n.endswith(BASE_A)]
    return {p: Product(tensors[PREFIX + p + BASE_B], tensors[PREFIX + p + BASE_A]) for p in paths}


def effective(adapter: AdapterState, pieces: Sequence[Piece] = ()) -> dict[str, Product]:
    """Return each layer's whole change: the adapter's delta and the side adapters, as one product."""
    moved = join(pieces)
    return {
        path: product.total(product.of(module), moved[path]) if path in moved else product.of(module)
        for path, module in adapter.items()
    }


def as_adapter(adapter: AdapterState, pieces: Sequence[Piece] = ()) -> AdapterState:
    """Return one adapter with the same effect, of the rank that needs; without pieces the adapter itself.

    All layers get the largest rank any of them needs, and alpha = rank, so that PEFT's scale is 1.
    """
    if not pieces:
        return adapter
    whole = {p: product.compressed(w) if w.inner > w.full else w for p, w in effective(adapter, pieces).items()}
    rank = max(w.inner for w in whole.values())
    even = {path: product.padded(w, rank) for path, w in whole.items()}
    return {p: replace(adapter[p], a=w.right, b=w.left, alpha=float(rank), rslora=False) for p, w in even.items()}
