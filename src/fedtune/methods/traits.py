"""What follows from what a method declares, and from what it overrides."""

from __future__ import annotations

from fedtune.methods.base import ANY, Method
from fedtune.methods.by_layer import ByLayer
from fedtune.methods.moves_base import MovesBase
from fedtune.methods.state import Sizes
from fedtune.names import A, B

Kind = type[Method]


def moves_base(kind: Kind) -> bool:
    """Tell whether it moves the base model by low-rank side adapters."""
    return issubclass(kind, MovesBase)


def cuts(kind: Kind) -> bool:
    """Tell whether an aggregation of folders can be cut to a rank that is asked for."""
    return issubclass(kind, ByLayer) and kind.mixed_ranks


def comparable(kind: Kind) -> bool:
    """Tell whether an update stands for a model, so that it can be compared with others and with the ideal update."""
    return kind.updates != "opaque"


def by_product(kind: Kind) -> bool:
    """Tell whether only an update's product, with its weight, reaches the model."""
    return kind.updates == "product"


def magnitudes(kind: Kind) -> str:
    """Return how DoRA's magnitudes are averaged: "exact" (by the map of `lora.dora`), "mean", or "" (not defined)."""
    if "dora" in kind.spaces:
        return "exact"
    return "mean" if kind.spaces & ANY and comparable(kind) else ""


def sends_pairs(kind: Kind) -> bool:
    """Tell whether a client sends both factors of a layer, so that it is free to choose their gauge."""
    return comparable(kind) and kind.traffic(Sizes(a=1, b=1, rank=1, clients=1))[0] >= 2


def same_every_round(kind: Kind) -> bool:
    """Tell whether a client does the plain work, and its messages have the same tensors in every round."""
    made = kind(kind.Parameters.model_construct())
    return kind.fit is Method.fit and all(made.trainable(1, end) == made.trainable(2, end) for end in (A, B))
