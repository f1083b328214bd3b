"""The state of an adapter, apart from any model: one `LoraModule` for each adapted layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedtune.types import AdapterError

PREFIX = "base_model.model."
A, B, M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer: dW = s B A with B [out, r], A [r, in] and s = alpha/r (alpha/sqrt(r) for rsLoRA).

    Attributes:
        a: [r, in].
        b: [out, r].
        alpha: the numerator of the scale.
        rslora: rank-stabilised scale (arXiv 2312.03732).
        magnitude: DoRA's m [out] (arXiv 2402.09353), or None.
        conv1d: the layer stores its weight as [in, out] (GPT-2's Conv1D): `delta` is transposed for it.
    """

    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None
    conv1d: bool = False

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        """The scale s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Tensor:
        """Return s B A in float32 or better, in the orientation of the weight it is added to."""
        kind = torch.promote_types(self.a.dtype, torch.float32)
        dense = self.scale * (self.b.to(kind) @ self.a.to(kind))
        return dense.T if self.conv1d else dense


AdapterState = dict[str, LoraModule]


def to_tensors(adapter: Mapping[str, LoraModule]) -> dict[str, Tensor]:
    """Return the adapter under the names of PEFT's `adapter_model.safetensors`."""
    tensors: dict[str, Tensor] = {}
    for path, module in adapter.items():
        tensors[PREFIX + path + A] = module.a
        tensors[PREFIX + path + B] = module.b
        if module.magnitude is not None:
            tensors[PREFIX + path + M] = module.magnitude
    return tensors


def with_tensors(like: Mapping[str, LoraModule], tensors: Mapping[str, Tensor]) -> AdapterState:
    """Return `like` with its tensors replaced.

    Raises:
        AdapterError: a name is missing or unknown.
    """
    names = to_tensors(like)
    if set(names) != set(tensors):
        odd = sorted(set(names) ^ set(tensors))[:3]
        raise AdapterError(f"the adapter's tensors are not those expected; first that differ: {', '.join(odd)}")
    return {
        path: replace(
            module,
            a=tensors[PREFIX + path + A],
            b=tensors[PREFIX + path + B],
            magnitude=None if module.magnitude is None else tensors[PREFIX + path + M],
        )
        for path, module in like.items()
    }


def parameters(adapter: Mapping[str, LoraModule]) -> int:
    """Return how many numbers the adapter has."""
    return sum(t.numel() for t in to_tensors(adapter).values())
