"""Attach a PEFT adapter to a resident base model, and save its state as a PEFT folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedtune.config.schema import LoraSettings
from fedtune.io import write_bytes, write_json
from fedtune.lora.state import AdapterState, LoraModule, Plain, to_tensors
from fedtune.models.adapted import AdaptedModel
from fedtune.models.dropout import KeyedDropout, Keys
from fedtune.models.load import LoadedModel
from fedtune.models.sides import Sides
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.names import PREFIX, A, B, M
from fedtune.types import ModelError, nearest


def _file_name(parameter: str) -> str:
    """Turn a parameter's name in the model into its name in PEFT's file format."""
    name = parameter.replace(".default.", ".").replace(f"{M}.weight", M)
    return name.removesuffix(".default")


def _layout(layers: Mapping[str, Any], slots: Mapping[str, torch.nn.Parameter], config: Any) -> AdapterState:
    tensors = {name: slot.detach().to("cpu", copy=True) for name, slot in slots.items()}
    if config.peft_type != "LORA":
        return Plain(config.peft_type.lower(), tensors)
    return {
        path: LoraModule(
            a=tensors[PREFIX + path + A],
            b=tensors[PREFIX + path + B],
            alpha=float(layer.lora_alpha["default"]),
            rslora=config.use_rslora,
            magnitude=tensors.get(PREFIX + path + M),
            conv1d=bool(getattr(layer, "fan_in_fan_out", False)),
        )
        for path, layer in layers.items()
    }


def targets(base: LoadedModel, key: str, names: Sequence[str]) -> Any:
    """Return names of layers, or "all-linear" alone, as PEFT takes them: None where there are none.

    Raises:
        ModelError: a name that no layer has, with the nearest one.
    """
    if tuple(names) == ("all-linear",):
        return "all-linear"
    present = {name.rsplit(".", 1)[-1] for name, _ in base.model.named_modules()}
    for target in names:
        if target.rsplit(".", 1)[-1] not in present:
            raise ModelError(f"{key}: {base.name} has no {target!r}; {nearest(target, present)}")
    return list(names) or None


def attach(base: LoadedModel, settings: LoraSettings, seed: int) -> AdaptedModel:
    """Put a fresh LoRA, rsLoRA or DoRA adapter on a base model, the same for the same seed; raises as `attach_as`."""
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets(base, "lora.target_modules", settings.target_modules),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    return attach_as(base, config, seed)


def attach_ia3(base: LoadedModel, names: Sequence[str], feedforward: Sequence[str]) -> AdaptedModel:
    """Put IA3's vectors of ones on layers, PEFT's by default; `feedforward` are those whose input is scaled.

    Raises as `attach_as`.
    """
    from peft import IA3Config

    config = IA3Config(
        target_modules=targets(base, "peft.target_modules", names),
        feedforward_modules=targets(base, "peft.feedforward_modules", feedforward),
        task_type="CAUSAL_LM",
    )
    return attach_as(base, config, seed=0)


def _with_peft(base: LoadedModel, config: Any) -> tuple[Any, dict[str, torch.nn.Parameter], dict[str, Any]]:
    """Return PEFT's model with a fresh adapter, the adapter's parameters and its layers, as `AdaptedModel` has them."""
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    key = "lora.target_modules" if config.peft_type == "LORA" else "peft.target_modules"
    with warnings.catch_warnings():
        # of merging a head that is tied to the embedding, which is never done here
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        try:
            model = get_peft_model(base.model, config)
        except ValueError as err:
            raise ModelError(f"{base.name}: {err}; name the layers in {key}") from err
    slots = {_file_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    layers = {path: m for path, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    if others := [path for path, layer in layers.items() if not _is_linear(layer)]:
        kind = type(layers[others[0]].get_base_layer()).__name__
        model.unload()
        raise ModelError(f"{base.name}: the target {others[0]} is of the kind {kind}; only linear layers are adapted")
    return model, slots, layers


def attach_as(base: LoadedModel, config: Any, seed: int) -> AdaptedModel:
    """Put a fresh adapter with the settings of PEFT's LoraConfig or IA3Config on a base model.

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
    if getattr(config, "lora_dropout", 0):
        for number, layer in enumerate(layers.values()):
            layer.lora_dropout["default"] = KeyedDropout(config.lora_dropout, number, keys)
    return AdaptedModel(base, model, slots, _layout(layers, slots, config), layers, sides, keys)


def shapes_as(base: LoadedModel, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what `attach_as` would put on a model, and raise as it would; nothing is made."""
    dora = getattr(config, "use_dora", False)
    # the start of DoRA's magnitudes is computed from the weights, which are not on the meta device
    with torch.device("meta"):
        model, slots, _ = _with_peft(base, replace(config, use_dora=False) if dora else config)
    shapes = {name: tuple(slot.shape) for name, slot in slots.items()}
    model.unload()
    if dora:
        shapes |= {n.removesuffix(B) + M: shape[:1] for n, shape in shapes.items() if n.endswith(B)}
    return shapes


def _is_linear(layer: Any) -> bool:
    """Tell whether an adapted layer has tensors of two dimensions: embeddings and convolutions have others."""
    held = getattr(layer, layer.adapter_layer_names[0])
    return "default" in held and getattr(held["default"], "weight", held["default"]).dim() == 2


def save(adapted: AdaptedModel, adapter: AdapterState, folder: Path) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads; LoRA's rank and scale are the adapter's own."""
    import safetensors.torch

    config = adapted.model.peft_config["default"].to_dict() | {"inference_mode": True}
    if not isinstance(adapter, Plain):
        first = next(iter(adapter.values()))
        config |= {"r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora}
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    write_json(folder / CONFIG, plain)
    tensors = {name: t.contiguous() for name, t in to_tensors(adapter).items()}
    write_bytes(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
