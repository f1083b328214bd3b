"""Attach a PEFT adapter to a resident base model, swap its state, and save or load it as a PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.config.schema import LoraSettings
from fedtune.io import read_json, tensor_header, write_bytes, write_json
from fedtune.lora.state import AdapterState, LoraModule, from_tensors, to_tensors, with_tensors
from fedtune.models.load import LoadedModel
from fedtune.types import AdapterError, ModelError, nearest

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with one adapter, whose state can be exchanged in place.

    Attributes:
        base: what it stands on.
        model: the PEFT model.
        slots: the adapter's parameters by the names of the PEFT file format.
        layout: the adapter as it was attached: initial values, shapes, scales and orientation.
    """

    base: LoadedModel
    model: Any
    slots: Mapping[str, torch.nn.Parameter]
    layout: AdapterState

    def state(self) -> AdapterState:
        """Return a copy of the adapter as it is now, on the CPU."""
        tensors = {name: p.detach().to("cpu", copy=True) for name, p in self.slots.items()}
        return with_tensors(self.layout, tensors)

    def load_state(self, adapter: Mapping[str, LoraModule]) -> None:
        """Copy a state into the model. Raises AdapterError if names or shapes differ; nothing is loaded then."""
        load_tensors(self.slots, to_tensors(adapter))


def load_tensors(slots: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters, strictly: all names, all shapes.

    Raises:
        AdapterError: with both values of the first difference.
    """
    if set(slots) != set(tensors):
        missing, extra = sorted(set(slots) - set(tensors)), sorted(set(tensors) - set(slots))
        raise AdapterError(
            "the adapter belongs to another model or has other targets: "
            f"{len(missing)} tensors missing (first: {missing[:1]}), {len(extra)} unknown (first: {extra[:1]})"
        )
    for name, slot in slots.items():
        if slot.shape != tensors[name].shape:
            raise AdapterError(f"{name}: shape {tuple(tensors[name].shape)}, this model needs {tuple(slot.shape)}")
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[name])


def _file_name(parameter: str) -> str:
    """Turn a parameter's name in the model into its name in PEFT's file format."""
    name = parameter.replace(".default.", ".").replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
    return name.removesuffix(".default")


def _layout(model: Any, slots: Mapping[str, torch.nn.Parameter], settings: LoraSettings) -> AdapterState:
    modules: AdapterState = {}
    for path, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        get = f"base_model.model.{path}"
        modules[path] = LoraModule(
            a=slots[f"{get}.lora_A.weight"].detach().to("cpu", copy=True),
            b=slots[f"{get}.lora_B.weight"].detach().to("cpu", copy=True),
            alpha=settings.alpha,
            rslora=settings.rslora,
            magnitude=slots[f"{get}.lora_magnitude_vector"].detach().to("cpu", copy=True) if settings.dora else None,
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
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_checked_targets(base, settings),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(base.model, config)
        except ValueError as err:
            raise ModelError(f"{base.name}: {err}; name the layers in lora.target_modules") from err
    slots = {_file_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    model.peft_config["default"].base_model_name_or_path = base.name
    model.peft_config["default"].revision = base.revision
    return AdaptedModel(base, model, slots, _layout(model, slots, settings))


def detach(adapted: AdaptedModel) -> LoadedModel:
    """Take the adapter off again, leaving the base model as it was."""
    adapted.model.unload()
    return adapted.base


def save(adapted: AdaptedModel, adapter: Mapping[str, LoraModule], folder: Path) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads."""
    import safetensors.torch

    config = adapted.model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    write_json(folder / CONFIG, plain)
    tensors = {name: t.contiguous() for name, t in to_tensors(adapter).items()}
    write_bytes(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def read_folder(folder: Path) -> tuple[LoraSettings, str, dict[str, Tensor]]:
    """Read a PEFT adapter folder that anybody made.

    Returns:
        Its settings, the name of its base model, and its tensors.

    Raises:
        AdapterError: pickled weights, a link that leads outside, or not a LoRA adapter.
        CorruptFileError: a damaged file.
    """
    import safetensors.torch

    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder}: no {CONFIG}; this is not a PEFT adapter folder")
    for path in (folder / CONFIG, folder / WEIGHTS):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise AdapterError(f"{path}: a link that leads outside the folder is not followed")
    if not (folder / WEIGHTS).exists():
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        raise AdapterError(
            f"{folder}: no {WEIGHTS}"
            + (f"; {pickled[0]} is a pickle, which can run code and is not read" if pickled else "")
            + ". Convert it where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), out)"
        )
    config = read_json(folder / CONFIG)
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise AdapterError(f"{folder}: a {config.get('peft_type')} adapter; only LoRA adapters are read")
    tensor_header(folder / WEIGHTS)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    targets = config.get("target_modules") or ()
    settings = LoraSettings(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )
    return settings, str(config.get("base_model_name_or_path", "")), tensors


def read_state(folder: Path) -> AdapterState:
    """Read an adapter folder as a state, without its base model.

    Raises:
        AdapterError, CorruptFileError: as `read_folder`; also for ranks or alphas that differ between layers.
    """
    settings, _, tensors = read_folder(folder)
    config = read_json(folder / CONFIG)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise AdapterError(f"{folder}: rank_pattern and alpha_pattern are not read")
    state = from_tensors(tensors, settings.alpha, rslora=settings.rslora, conv1d=bool(config.get("fan_in_fan_out")))
    wrong = [path for path, module in state.items() if module.rank != settings.r]
    if wrong:
        raise AdapterError(f"{folder}: {wrong[0]} has rank {state[wrong[0]].rank}, its {CONFIG} says {settings.r}")
    return state


def load_folder(base: LoadedModel, folder: Path, *, check_base: bool = True) -> AdaptedModel:
    """Attach an adapter folder to its base model, strictly.

    Raises:
        AdapterError: unsafe, or made for another base model, vocabulary or targets; with both values.
    """
    settings, made_for, tensors = read_folder(folder)
    if check_base and made_for and made_for != base.name and Path(made_for).name != Path(base.name).name:
        raise AdapterError(f"{folder} was trained on {made_for!r}, the model given is {base.name!r}")
    adapted = attach(base, settings, seed=0)
    try:
        load_tensors(adapted.slots, tensors)
    except AdapterError as err:
        detach(adapted)
        raise AdapterError(f"{folder}: {err}") from err
    return adapted
