"""IA3: a vector that multiplies a layer's output, or a feed-forward layer's input (arXiv 2205.05638).

diag(l) W is linear in l, so the mean of clients' vectors is the model with the mean of their weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from pydantic import ValidationInfo, field_validator

from fedtune.config import Config
from fedtune.config.section import Section
from fedtune.models.adapter_config import AdapterConfig, IA3AdapterConfig
from fedtune.models.patterns import try_patterns
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.models.zoo import zoo
from fedtune.names import IA3 as VECTOR
from fedtune.spaces.base import Space
from fedtune.spaces.saved import Layers, by_layer, config_problems, ends, layer_problems, linears
from fedtune.types import AdapterError

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState
    from fedtune.models.adapted import AdaptedModel
    from fedtune.models.folder import FolderPlain
    from fedtune.models.load import LoadedModel
    from fedtune.results.entry import Entry

# PEFT's default layers by architecture; the input of the last one is scaled
USUAL = dict.fromkeys(("LlamaForCausalLM", "MistralForCausalLM"), ("k_proj", "v_proj", "down_proj"))
_OTHERS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
USUAL |= dict.fromkeys(_OTHERS, ("q_proj", "v_proj", "down_proj"))


class IA3(Space):
    """One vector for each target layer."""

    name = "ia3"
    title = "(IA)3: learned vectors that rescale activations"
    paper = "arXiv:2205.05638"
    unsubmitted = ""

    class Parameters(Section):
        """Layers by name, by default PEFT's for the architecture; of `feedforward_modules` the input is scaled."""

        target_modules: tuple[str, ...] = ()
        feedforward_modules: tuple[str, ...] = ()

        @field_validator("feedforward_modules")
        @classmethod
        def _among_targets(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
            chosen = info.data.get("target_modules", ())
            if extra := sorted(set(value) - set(chosen)) if chosen != ("all-linear",) else []:
                raise ValueError(f"{extra[0]!r} is none of peft.target_modules")
            return value

    def attach(self, base: LoadedModel, config: Config, seed: int) -> AdaptedModel:
        """Put vectors of ones on the target layers."""
        from fedtune.models.adapter import attach_ia3

        own = self.Parameters.model_validate(config.peft.parameters)
        return attach_ia3(base, own.target_modules, own.feedforward_modules)

    def save(self, adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
        """Write a PEFT folder."""
        from fedtune.models.adapter import save

        save(adapted, state, folder)

    def opened(self, folder: Path) -> FolderPlain:
        """Open a PEFT folder, vector by vector; its settings have to be those of its vectors."""
        from fedtune.models.folder import FileTensors, FolderPlain, checked

        config, header = checked(folder)
        if not isinstance(config, IA3AdapterConfig):
            raise AdapterError(f"{folder}: peft_type = {config.kind}; an IA3 adapter is wanted")
        try:
            layers = vectors(header)
            try_patterns(config.patterns, list(layers))
            if why := unmade(config, layers):
                raise AdapterError(why)
        except AdapterError as err:
            raise AdapterError(f"{folder}: {err}") from err
        alike = {k: sorted(v) if isinstance(v, list) else v for k, v in config.for_peft().items()}
        files = FileTensors({folder / WEIGHTS: header})
        return FolderPlain(self.name, tensors=files, folder=folder, config=config, alike=alike)

    def layers(self, header: Mapping[str, Any]) -> Layers:
        """Return the shape of each layer's vector."""
        return vectors(header)

    def on_base(self, entry: Entry) -> Layers | None:
        """Return the shapes of the vectors on the layers that the settings name, by default PEFT's."""
        base, own = zoo().get(entry.base), self.Parameters.model_validate(entry.settings.peft.parameters)
        usual = USUAL.get(base.architecture, ()) if base else ()
        inputs = own.feedforward_modules or usual[-1:]
        found = linears(entry, own.target_modules or usual)
        if found is None or not inputs:
            return None
        return {path: (1, i) if path.endswith(inputs) else (o, 1) for path, (i, o) in found.items()}

    def numbers(self, shape: Sequence[int], config: Config) -> tuple[int, int, int]:
        """Count those of the vector."""
        return shape[0] * shape[1], 0, 0

    def saved_problems(
        self, config: AdapterConfig, layers: Layers, entry: Entry, *, grown: bool
    ) -> Iterator[tuple[str, str]]:
        """Yield settings of another base model or of other layers, and vectors that the run's settings do not make."""
        if not isinstance(config, IA3AdapterConfig):
            yield CONFIG, f"is of kind {config.kind}, the settings say IA3"
            return
        yield from config_problems(config, layers, entry)
        own, said = self.Parameters.model_validate(entry.settings.peft.parameters), config.feedforward_modules
        if not isinstance(said, list):
            yield CONFIG, "feedforward_modules is no list of names; a run writes one"
        elif own.feedforward_modules and set(said) != set(own.feedforward_modules):
            yield CONFIG, f"feedforward_modules is {short(said)}, the settings say {short(own.feedforward_modules)}"
        elif isinstance(config.target_modules, list) and (why := unmade(config, layers)):
            yield CONFIG, why
        yield from layer_problems(layers, self.on_base(entry), set(own.target_modules), "peft.target_modules")


def vectors(header: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the shape of each layer's vector by the layer's path, [out, 1] or [1, in].

    Raises:
        AdapterError: tensors that are no such vectors.
    """
    found = {}
    for path, own in by_layer(header, (VECTOR,), "vector").items():
        shape = own[VECTOR]
        if len(shape) != 2 or 1 not in shape or 0 in shape:
            raise AdapterError(f"{path[:200]}: the vector is of shape {shape}, [out, 1] or [1, in] wanted")
        found[path] = (shape[0], shape[1])
    if not found:
        raise AdapterError("has no vector")
    return found


def unmade(config: IA3AdapterConfig, layers: Layers) -> str:
    """Say which layer's vector PEFT would not make of an adapter's settings, or return an empty text."""
    targets, inputs = config.target_modules, config.feedforward_modules
    for path, shape in layers.items():
        if isinstance(targets, list):
            meant = not ends(path).isdisjoint(targets)
        else:
            meant = targets in (None, "all-linear") or bool(re.fullmatch(targets, path))
        if not meant:
            return f"target_modules names no layer {path[:200]}, which has a vector"
        if inputs is not None and shape != (1, 1):
            # as PEFT has it: any end of a path, also within a name
            on_input = path.endswith(tuple(inputs)) if isinstance(inputs, list) else bool(re.fullmatch(inputs, path))
            if on_input != (shape[0] == 1):
                how = "[1, in], as it is" if on_input else "[out, 1], as it is not"
                return f"{path[:200]}: the vector is of shape {list(shape)}, not {how} in feedforward_modules"
    return ""
