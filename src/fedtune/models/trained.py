"""A trained adapter, from a PEFT folder that anybody made, on its base model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtune.models.adapted import AdaptedModel, check_shapes, load_tensors
from fedtune.models.adapter import attach_as, shapes_as
from fedtune.models.adapter_config import MERGE, AdapterConfig
from fedtune.models.folder import checked
from fedtune.models.load import LoadedModel
from fedtune.models.patterns import try_patterns
from fedtune.models.source import WEIGHTS
from fedtune.names import PREFIX
from fedtune.types import AdapterError, ModelError

log = logging.getLogger("fedtune")

_PINNED = re.compile(r"[0-9a-f]{40}|sha256:[0-9a-f]{64}")


def _check_base(folder: Path, config: AdapterConfig, base: LoadedModel, insist: bool) -> None:
    """Refuse another base model than the adapter names, or say so where it is insisted on."""
    if config.base and not config.is_of(base.name):
        differs = f"{folder} was trained on {config.base[:200]!r}, the model given is {base.name!r}"
        if not insist:
            raise AdapterError(f"{differs}; give --base to insist")
        log.warning("%s", differs)
    elif config.revision and _PINNED.fullmatch(config.revision) and config.revision != base.revision:
        log.warning("%s was trained on %s, this base model is %s", folder, config.revision[:19], base.revision[:19])


def load_folder(base: LoadedModel, folder: Path, *, insist: bool = False) -> AdaptedModel:
    """Attach an adapter folder to its base model, strictly and as PEFT would; with `insist` to another than it names.

    Raises:
        AdapterError: unsafe, or made for another base model, vocabulary or targets; with both values.
    """
    from peft import IA3Config, LoraConfig
    from safetensors.torch import load_file

    config, _ = checked(folder)
    _check_base(folder, config, base, insist)
    own = _without_base(folder, base, load_file(folder / WEIGHTS))
    try:
        kind = {"LORA": LoraConfig, "IA3": IA3Config}[config.kind]
        settings = kind(**config.for_peft(), task_type="CAUSAL_LM")
        try_patterns(config.patterns, [name for name, _ in base.model.named_modules()])
        # before it is attached: a few bytes of settings can ask for more memory than there is
        check_shapes(shapes_as(base, settings), own)
        adapted = attach_as(base, settings, seed=0)
    except (AdapterError, ModelError, ValueError, TypeError) as err:
        raise AdapterError(f"{folder}: {err}") from err
    load_tensors(adapted.slots, own)
    return adapted


def _without_base(folder: Path, base: LoadedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter's own tensors, without the embeddings that PEFT writes too and that have to be as here."""
    weights, own = dict(base.model.named_parameters(remove_duplicate=False)), {}
    for name, tensor in tensors.items():
        weight = weights.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if weight is None:
            own[name] = tensor
        elif weight.shape != tensor.shape or not torch.equal(tensor.to(weight), weight):
            raise AdapterError(
                f"{folder}: brings a {name} of its own {tuple(tensor.shape)}, which is not the base model's "
                f"{tuple(weight.shape)}; {MERGE}"
            )
    return own
