"""Which numbers of an update a server half takes: finite ones, none absurdly large, and relative magnitudes above 0.

Products of such numbers stay far inside float32's range, so no aggregation overflows, divides by zero or hands NaN to
LAPACK because of what one client sent. A trained adapter's numbers are below 100. A layer's product is bounded too: an
SVD makes factors of its size, which the clients of the next round must be able to send.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState
    from fedtune.methods.local import Tensors

LARGEST, STRONGEST = 1e9, 1e6
_MAGNITUDE = ".lora_magnitude_vector"


def unsound(tensors: Tensors, *, relative: bool = False) -> str:
    """Say which tensor has a number that no server half takes, or return an empty string.

    Args:
        tensors: what a client sent.
        relative: magnitudes are DoRA's relative ones, by which the server divides.
    """
    import torch

    from fedtune.lora.dora import SMALLEST

    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        largest = float(torch.linalg.vector_norm(tensor, math.inf))
        if not largest <= LARGEST:
            return f"{name} has a number of size {largest:.3g}; at most {LARGEST:g} is taken"
        if relative and name.endswith(_MAGNITUDE) and float(tensor.min()) < SMALLEST:
            return f"{name} has a relative magnitude of {float(tensor.min()):.3g}; it must be at least {SMALLEST:g}"
    return ""


def too_strong(adapter: AdapterState) -> str:
    """Say which layer's product is larger than a server half takes, or return an empty string."""
    from fedtune.lora.product import size

    sizes = {path: size(module) for path, module in adapter.items()}
    return next(
        (
            f"{p}: the product has norm {s:.3g}; at most {STRONGEST:g} is taken"
            for p, s in sizes.items()
            if s > STRONGEST
        ),
        "",
    )
