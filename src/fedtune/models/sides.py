"""What methods put beside PEFT's LoRA in an adapted layer, by forward hooks: nothing of it touches a weight.

Names end, after PEFT's prefix and the layer's path, in
  .base_A.weight [n, in], .base_B.weight [out, n]    a frozen change of the base model: + base_B base_A x
  .lora_R.weight [r, r]                              a core between the factors: s B R A x (Fed-SB)
  .other_A.weight [r, in], .other_B.weight [out, r]  a second adapter with the first one's scale
  .router.weight [2, in]                             softmax over (own, other), for each token (FedALT)
and, for the whole model, `mix.weight` [] or `mix.anchors` [n, hidden]: the second adapter's weight, fixed or by the
similarity of a text to the anchors (FedDPA); the first one then has the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.names import ANCHORS, BASE_A, BASE_B, CORE, MIX, OTHER_A, OTHER_B, PREFIX, ROUTER, SIDES
from fedtune.types import AdapterError


class _Layer:
    """The side tensors of one adapted layer, and the hooks that apply them."""

    def __init__(self, layer: Any, sides: Sides) -> None:
        self.layer = layer
        self.sides = sides
        self.tensors: dict[str, torch.nn.Parameter] = {}
        self.gates: tuple[Tensor | float, Tensor | float] = (1.0, 1.0)
        layer.register_forward_pre_hook(self._before)
        layer.register_forward_hook(self._after)
        layer.lora_A["default"].register_forward_hook(self._core)
        layer.lora_B["default"].register_forward_hook(self._own)

    def _before(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        """Set the weights of the two adapters for this input."""
        self.gates = (1.0, 1.0)
        if not self.sides.active or OTHER_A not in self.tensors:
            return
        if ROUTER in self.tensors:
            router = self.tensors[ROUTER]
            shares = F.linear(inputs[0].to(router.dtype), router).softmax(-1)
            self.gates = (shares[..., :1], shares[..., 1:])
        elif self.sides.mix is not None:
            self.gates = (1 - self.sides.mix, self.sides.mix)
        elif self.sides.per_text:
            raise AdapterError("how much each of the two adapters counts depends on the text, and was not set for it")

    def _core(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        core = self.tensors.get(CORE)
        return None if core is None or not self.sides.active else F.linear(output, core)

    def _own(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        gate = self.gates[0]
        return None if isinstance(gate, float) and gate == 1.0 else output * gate

    def _after(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Add the second adapter and the change of the base, in their own precision."""
        if not self.sides.active or not ({OTHER_A, BASE_A} & self.tensors.keys()):
            return None
        x = inputs[0]
        if OTHER_A in self.tensors:
            a, b = self.tensors[OTHER_A], self.tensors[OTHER_B]
            added = F.linear(F.linear(x.to(a.dtype), a), b) * self.layer.scaling["default"] * self.gates[1]
            output = output + added.to(output.dtype)
        if BASE_A in self.tensors:
            a, b = self.tensors[BASE_A], self.tensors[BASE_B]
            output = output + F.linear(F.linear(x.to(a.dtype), a), b).to(output.dtype)
        return output


class Sides:
    """All side tensors of an adapted model. Without any, no hook is registered."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._modules = dict(layers)
        self._layers: dict[str, _Layer] = {}
        self.active = True
        self.mix: Tensor | float | None = None
        self.anchors: Tensor | None = None
        self._weight = 0.5

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the side tensors by name, to be trained or read."""
        return {
            PREFIX + path + end: parameter
            for path, layer in self._layers.items()
            for end, parameter in layer.tensors.items()
        }

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Replace all side tensors; an empty mapping removes them. Raises AdapterError where no layer is adapted."""
        placed: dict[str, dict[str, torch.nn.Parameter]] = {}
        for name, tensor in tensors.items():
            if name in (ANCHORS, MIX):
                continue
            end = next(end for end in SIDES if name.endswith(end))
            path = name.removeprefix(PREFIX).removesuffix(end)
            if path not in self._modules:
                raise AdapterError(f"{name}: the model has no adapted layer {path}")
            value = tensor.detach().to(device, copy=True)
            placed.setdefault(path, {})[end] = torch.nn.Parameter(value, requires_grad=False)
        for path in placed:
            if path not in self._layers:
                self._layers[path] = _Layer(self._modules[path], self)
        for path, layer in self._layers.items():
            layer.tensors = placed.get(path, {})
        anchors = tensors.get(ANCHORS)
        self.anchors = None if anchors is None else anchors.detach().to(device)
        self._weight = float(tensors[MIX]) if MIX in tensors else 0.5
        self.mix = self._weight if MIX in tensors and anchors is None else None

    @property
    def per_text(self) -> bool:
        """Whether the second adapter's weight depends on the text."""
        return self.anchors is not None

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Leave all side tensors out."""
        was, self.active = self.active, False
        try:
            yield
        finally:
            self.active = was

    @contextlib.contextmanager
    def mixed(self, features: Callable[[], Tensor], spread: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Weigh the second adapter for each text of a pass, where it depends on the text.

        Args:
            features: returns the base model's last hidden state of each text [texts, hidden].
            spread: lays the texts' weights [texts] out over the pass's tokens.
        """
        if not self.per_text:
            yield
            return
        self.mix = spread(self.similarity(features()))
        try:
            yield
        finally:
            self.mix = None

    def similarity(self, features: Tensor) -> Tensor:
        """Return each text's weight [texts]: the mean cosine similarity to the anchors, times the factor, in 0 to 1."""
        if self.anchors is None:
            raise ValueError("there are no anchors to compare with")
        ones = F.normalize(features.float(), dim=-1)
        weight: Tensor = (ones @ F.normalize(self.anchors.float(), dim=-1).T).mean(-1) * self._weight
        return weight.clamp(0, 1)


@contextlib.contextmanager
def without(model: Any) -> Iterator[None]:
    """Leave the sides of a model out, if it has any."""
    found = of(model)
    with found.off() if found else contextlib.nullcontext():
        yield


def of(model: Any) -> Sides | None:
    """Return the sides of an adapted model, if it has any."""
    found = getattr(model, "fedtune_sides", None)
    return found if isinstance(found, Sides) else None
