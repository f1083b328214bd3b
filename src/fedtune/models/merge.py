"""An adapter folded into the base weights for the time of an evaluation, which then come back bit for bit."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch

from fedtune.lora.state import Plain
from fedtune.models.adapted import AdaptedModel


def _shared(adapted: AdaptedModel) -> bool:
    """Tell whether another place of the model uses an adapted weight, as a head tied to the embedding does."""
    places = Counter(
        parameter.data_ptr()
        for _, module in adapted.model.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )
    return any(places[layer.get_base_layer().weight.data_ptr()] > 1 for layer in adapted.layers.values())


def foldable(adapted: AdaptedModel) -> bool:
    """Tell whether folding loses nothing but rounding: float32 weights, each of one layer; plain LoRA, alone.

    A weight of 16 bits or fewer would swallow much of the adapter, which then would not be what was trained; and a
    weight that two layers share must not be changed through one of them.
    """
    if isinstance(adapted.layout, Plain):
        return False
    plain = not any(adapted.sides.parameters()) and not any(m.magnitude is not None for m in adapted.layout.values())
    weights = [layer.get_base_layer().weight for layer in adapted.layers.values()]
    exact = all(w.dtype in (torch.float32, torch.float64) for w in weights)
    return plain and exact and not adapted.sides.per_text and not _shared(adapted)


@contextlib.contextmanager
def folded(adapted: AdaptedModel) -> Iterator[bool]:
    """Let the model compute with W + s B A where that is possible; yields whether it is.

    The weights come back from copies: subtracting again would leave a trace of every adapter that was evaluated.
    """
    if not foldable(adapted):
        yield False
        return
    weights = [(layer.get_base_layer().weight, layer) for layer in adapted.layers.values()]
    copies = [weight.detach().clone() for weight, _ in weights]
    try:
        with torch.no_grad():
            for weight, layer in weights:
                weight += layer.get_delta_weight("default")
        with adapted.model.disable_adapter():
            yield True
    finally:
        with torch.no_grad():
            for (weight, _), copy in zip(weights, copies, strict=True):
                weight.copy_(copy)
