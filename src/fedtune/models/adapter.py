"""Attach a PEFT adapter to a resident base model, swap its state, and save or load it as a PEFT folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.config.schema import LoraSettings
from fedtune.io import write_bytes, write_json
from fedtune.lora.dora import row_norms
from fedtune.lora.state import AdapterState, LoraModule, to_tensors, with_tensors
from fedtune.models.dropout import KeyedDropout, Keys
from fedtune.models.load import LoadedModel
from fedtune.models.sides import Sides
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.names import PREFIX, A, B, M, is_side
from fedtune.types import AdapterError, ModelError, nearest


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with one adapter, whose state can be exchanged in place.

    Attributes:
        base: what it stands on.
        model: the PEFT model.
        slots: the adapter's parameters by the names of the PEFT file format.
        layout: the adapter as it was attached: initial values, shapes, scales and orientation.
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

    def state(self) -> AdapterState:
        """Return a copy of the adapter as it is now, on the CPU."""
        tensors = {name: p.detach().to("cpu", copy=True) for name, p in self.slots.items()}
        return with_tensors(self.layout, tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy an adapter of at most the attached rank, and side tensors, into the model.

        A smaller rank fills the first components; the rest is zero and stays so, for neither factor has a gradient
        there. The layer's scale becomes that of the smaller rank.

        Raises:
            AdapterError: names or shapes that do not fit; nothing is loaded then.
        """
        own = {n: t for n, t in tensors.items() if not is_side(n)}
        ranks = {path: _rank(path, module, own) for path, module in self.layout.items()}
        load_tensors(self.slots, {n: _padded(n, t, self.slots[n]) if n in self.slots else t for n, t in own.items()})
        for path, rank in ranks.items():
            self.layers[path].scaling["default"] = self.layout[path].scale_at(rank)
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
        """Where the adapter is."""
        return next(iter(self.slots.values())).device

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
    axis = 0 if name.endswith(A) else 1
    if not name.endswith((A, B)) or tensor.dim() != 2 or tensor.shape[axis] >= slot.shape[axis]:
        return tensor
    missing = list(tensor.shape)
    missing[axis] = slot.shape[axis] - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis)


def check_shapes(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Make sure that tensors have all the names and shapes that are wanted, and no others.

    Raises:
        AdapterError: with both values of the first difference.
    """
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
    """Copy tensors into parameters, strictly: all names, all shapes.

    Raises:
        AdapterError: with both values of the first difference.
    """
    check_shapes({name: tuple(slot.shape) for name, slot in slots.items()}, tensors)
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[name])


def _file_name(parameter: str) -> str:
    """Turn a parameter's name in the model into its name in PEFT's file format."""
    name = parameter.replace(".default.", ".").replace(f"{M}.weight", M)
    return name.removesuffix(".default")


def _layout(layers: Mapping[str, Any], slots: Mapping[str, torch.nn.Parameter], config: Any) -> AdapterState:
    modules: dict[str, LoraModule] = {}
    for path, layer in layers.items():
        get = PREFIX + path
        modules[path] = LoraModule(
            a=slots[get + A].detach().to("cpu", copy=True),
            b=slots[get + B].detach().to("cpu", copy=True),
            alpha=float(layer.lora_alpha["default"]),
            rslora=config.use_rslora,
            magnitude=slots[get + M].detach().to("cpu", copy=True) if config.use_dora else None,
            conv1d=bool(getattr(layer, "fan_in_fan_out", False)),
        )
    return modules


def _checked_targets(base: LoadedModel, settings: LoraSettings) -> Any:
    """Return PEFT's `target_modules`, or raise with the nearest layer name."""
    if not settings.target_modules:
        return None
    if settings.target_modules == ("all-linear",):
        return "all-linear"
    present = {name.rsplit(".", 1)[-1] for name, _ in base.model.named_modules()}
    for target in settings.target_modules:
        if target.rsplit(".", 1)[-1] not in present:
            raise ModelError(f"lora.target_modules: {base.name} has no {target!r}; {nearest(target, present)}")
    return list(settings.target_modules)


def attach(base: LoadedModel, settings: LoraSettings, seed: int) -> AdaptedModel:
    """Put a fresh LoRA, rsLoRA or DoRA adapter on a base model; the same seed gives the same adapter.

    Raises:
        ModelError: a target the model does not have.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_checked_targets(base, settings),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    return attach_as(base, config, seed)


def _with_peft(base: LoadedModel, config: Any) -> tuple[Any, dict[str, torch.nn.Parameter], dict[str, Any]]:
    """Return PEFT's model with a fresh adapter, the adapter's parameters and its layers, as `AdaptedModel` has them."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # of merging a head that is tied to the embedding, which is never done here
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        try:
            model = get_peft_model(base.model, config)
        except ValueError as err:
            raise ModelError(f"{base.name}: {err}; name the layers in lora.target_modules") from err
    slots = {_file_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    layers = {path: m for path, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    if odd := [path for path, layer in layers.items() if not _is_linear(layer)]:
        kind = type(layers[odd[0]].get_base_layer()).__name__
        model.unload()
        raise ModelError(f"{base.name}: the target {odd[0]} is of the kind {kind}; only linear layers are adapted")
    return model, slots, layers


def attach_as(base: LoadedModel, config: Any, seed: int) -> AdaptedModel:
    """Put a fresh adapter with the settings of a PEFT LoraConfig on a base model.

    Raises:
        ModelError: a target the model does not have, or that is no linear layer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, slots, layers = _with_peft(base, config)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.peft_config["default"].revision = base.revision
    sides, keys = Sides(layers), Keys()
    model.fedtune_sides = sides
    if config.lora_dropout:
        for number, layer in enumerate(layers.values()):
            layer.lora_dropout["default"] = KeyedDropout(config.lora_dropout, number, keys)
    return AdaptedModel(base, model, slots, _layout(layers, slots, config), layers, sides, keys)


def shapes_as(base: LoadedModel, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the adapter that `attach_as` would put on a base model; nothing of it is made.

    Raises:
        ModelError: as `attach_as`.
    """
    # the start of DoRA's magnitudes is computed from the weights, which are not on the meta device
    with torch.device("meta"):
        model, slots, _ = _with_peft(base, replace(config, use_dora=False))
    shapes = {name: tuple(slot.shape) for name, slot in slots.items()}
    model.unload()
    if config.use_dora:
        shapes |= {n.removesuffix(B) + M: shape[:1] for n, shape in shapes.items() if n.endswith(B)}
    return shapes


def _is_linear(layer: Any) -> bool:
    """Tell whether an adapted layer is A and B of two dimensions: embeddings and convolutions have others."""
    return "default" in layer.lora_A and layer.lora_A["default"].weight.dim() == 2


def detach(adapted: AdaptedModel) -> LoadedModel:
    """Take the adapter off again, leaving the base model as it was."""
    adapted.model.unload()
    return adapted.base


def save(adapted: AdaptedModel, adapter: Mapping[str, LoraModule], folder: Path) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads; the rank and the scale are the adapter's own."""
    import safetensors.torch

    config = adapted.model.peft_config["default"].to_dict()
    first = next(iter(adapter.values()))
    config |= {"inference_mode": True, "r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora}
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    write_json(folder / CONFIG, plain)
    tensors = {name: t.contiguous() for name, t in to_tensors(adapter).items()}
    write_bytes(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
