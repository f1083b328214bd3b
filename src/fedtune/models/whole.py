"""A base model whose own weights are trained, and the model folder that comes of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fedtune.lora.state import AdapterState, Plain, to_tensors
from fedtune.models import rms_norm
from fedtune.models.adapted import AdaptedModel
from fedtune.models.dropout import Keys
from fedtune.models.load import LoadedModel
from fedtune.models.sides import Sides
from fedtune.types import ModelError


class WholeModel(AdaptedModel):
    """A base model whose own parameters are the state; the layout has the weights it was loaded with."""

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Compute with the weights that were loaded first."""
        self.load(to_tensors(self.layout))
        yield

    def detach(self) -> LoadedModel:
        """Put the base model back as it was: its weights, frozen, and its cheaper norms."""
        self.load(to_tensors(self.layout))
        self.base.model.requires_grad_(False)
        rms_norm.fuse(self.base.model)
        return self.base


def attach(base: LoadedModel, space: str, trained: Callable[[str], bool] = lambda name: True) -> WholeModel:
    """Make weights of a base model, those that are `trained` by name, the state, which is called after its space.

    A weight that two layers share is in it once. The cheaper norms give no gradient of their weights, so the model's
    own come back.

    Raises:
        ModelError: the weights are quantised, or none is trained.
    """
    model = base.model
    if getattr(model, "is_quantized", False):
        raise ModelError(f"{base.name}: quantised weights cannot be trained; set model.quantization = 0")
    rms_norm.restore(model)
    slots = {name: p for name, p in model.named_parameters() if p.is_floating_point() and trained(name)}
    if not slots:
        raise ModelError(f"{base.name}: has no weights that {space} would train")
    layout = Plain(space, {name: p.detach().to("cpu", copy=True) for name, p in slots.items()})
    return WholeModel(base, model, slots, layout, {}, Sides({}), Keys())


def save(adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
    """Write a model folder that transformers loads, with the base model's tokenizer; it appears whole."""
    from transformers.utils import logging

    adapted.load(to_tensors(state))
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        adapted.base.model.save_pretrained(fresh)
        adapted.base.tokenizer.save_pretrained(fresh)
    finally:
        if shown:
            logging.enable_progress_bar()
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
