"""A base model with what is trained of it, or beside it, whose state can be exchanged in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedtune.lora.dora import row_norms
from fedtune.lora.state import AdapterState, LoraModule, Plain, with_tensors
from fedtune.models.dropout import Keys
from fedtune.models.load import LoadedModel
from fedtune.models.sides import Sides
from fedtune.names import PREFIX, A, B, is_side, rank_axis
from fedtune.types import AdapterError


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with one adapter, whose state can be exchanged in place.

    Attributes:
        base: what it stands on.
        model: the PEFT model; the base model itself where there is no adapter.
        slots: the trained parameters by the names they have in messages and files.
        layout: the state as it was attached: initial values, shapes, scales and orientation.
        layers: PEFT's layers by path.
        sides: what methods put beside the adapter.
        keys: of the tokens in a pass, by which dropout is drawn.
    """

    base: LoadedModel
    model: Any
    slots: Mapping[str, torch.nn.Parameter]
    layout: AdapterState
    layers: Mapping[str, Any]
    sides: Sides
    keys: Keys

    @property
    def stackable(self) -> bool:
        """Whether several clients' states can lie side by side in one pass: only factors are added to one base."""
        return not isinstance(self.layout, Plain)

    def state(self) -> AdapterState:
        """Return a copy of the state as it is now, on the CPU."""
        tensors = {name: p.detach().to("cpu", copy=True) for name, p in self.slots.items()}
        return with_tensors(self.layout, tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a state, of at most the attached rank, and side tensors into the model.

        A smaller rank fills the first components; the rest is zero and stays so, for neither factor has a gradient
        there. The layer's scale becomes that of the smaller rank.

        Raises:
            AdapterError: names or shapes that do not fit; nothing is loaded then.
        """
        own = {n: t for n, t in tensors.items() if not is_side(n)}
        factored = {} if isinstance(self.layout, Plain) else self.layout
        ranks = {path: _rank(path, module, own) for path, module in factored.items()}
        load_tensors(self.slots, {n: _padded(n, t, self.slots[n]) if n in self.slots else t for n, t in own.items()})
        for path, rank in ranks.items():
            self.layers[path].scaling["default"] = factored[path].scale_at(rank)
        self.sides.load({n: t for n, t in tensors.items() if is_side(n)}, self.device)

    def read(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies on the CPU of the tensors that were loaded, as they are now and in the shapes they had."""
        now = {**self.slots, **self.sides.parameters()}
        found = {}
        for name, tensor in like.items():
            value = now[name].detach() if name in now else tensor
            found[name] = value[tuple(slice(n) for n in tensor.shape)].to("cpu", copy=True).contiguous()
        return found

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return next(iter(self.slots.values())).device

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Compute as the base model does. What was loaded before has to be loaded again."""
        with self.model.disable_adapter(), self.sides.off():
            yield

    def detach(self) -> LoadedModel:
        """Take the adapter off again, leaving the base model as it was."""
        self.model.unload()
        return self.base

    def row_norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ||W0 + s B A|| of each output row, by layer, for the factors given."""
        norms = {}
        for path, module in self.layout.items():
            a, b = (tensors[PREFIX + path + end].float() for end in (A, B))
            delta = replace(module, a=a, b=b).scale * (b @ a)
            weight = base_weight(self.layers[path]).to(delta.device)
            norms[path] = row_norms(weight.T if module.conv1d else weight, delta)
        return norms


def base_weight(layer: Any) -> Tensor:
    """Return a layer's base weight, dequantised where it is quantised."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach()
    return weight


def _rank(path: str, module: LoraModule, tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of a layer's factors, at most the attached one."""
    a, b = (tensors.get(PREFIX + path + end) for end in (A, B))
    if a is None or b is None or a.dim() != 2 or b.dim() != 2:
        return module.rank
    if a.shape[0] != b.shape[1] or a.shape[0] > module.rank:
        raise AdapterError(f"{path}: A has rank {a.shape[0]}, B {b.shape[1]}; this model has room for {module.rank}")
    return int(a.shape[0])


def _padded(name: str, tensor: Tensor, slot: Tensor) -> Tensor:
    """Return a factor padded with zeros to the slot's rank; anything else as it is."""
    axis = rank_axis(name)
    if axis is None or tensor.dim() != 2 or tensor.shape[axis] >= slot.shape[axis]:
        return tensor
    missing = slot.shape[axis] - tensor.shape[axis]
    return torch.nn.functional.pad(tensor, (0, missing) if axis else (0, 0, 0, missing))


def check_shapes(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Refuse other names and shapes than are wanted. Raises AdapterError with both values of the first difference."""
    if set(wanted) != set(tensors):
        missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
        raise AdapterError(
            "the adapter belongs to another model or has other targets: "
            f"{len(missing)} tensors missing (first: {missing[:1]}), {len(extra)} unknown (first: {extra[:1]})"
        )
    for name, shape in wanted.items():
        if shape != tensors[name].shape:
            raise AdapterError(f"{name}: shape {tuple(tensors[name].shape)}, this model needs {shape}")


def load_tensors(slots: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters, strictly: all names, all shapes. Raises AdapterError as `check_shapes`."""
    check_shapes({name: tuple(slot.shape) for name, slot in slots.items()}, tensors)
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[name])
