"""Full parameters: all weights of the base model are trained, in the precision it is loaded in.

Clients hold and send them so; the server keeps them, and adds up changes, in float32 (`lora.state.Plain`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config import Config
from fedtune.spaces.base import Space
from fedtune.types import Problem

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState
    from fedtune.models.adapted import AdaptedModel
    from fedtune.models.folder import FolderPlain
    from fedtune.models.load import LoadedModel


class Full(Space):
    """Every weight; one that two layers share is sent once."""

    name = "full"
    title = "all weights of the base model"
    folder = "model"
    whole = True
    unsubmitted = "a model folder is no part of a submission, so its runs cannot be submitted"

    def problems(self, config: Config) -> Iterator[Problem]:
        """Refuse quantised weights, which have no gradient."""
        if config.model.quantization:
            what = "quantised weights cannot be trained"
            yield Problem(f"model.quantization = {config.model.quantization}", what, "set model.quantization = 0")

    def attach(self, base: LoadedModel, config: Config, seed: int) -> AdaptedModel:
        """Make the base model's own weights the state; nothing of it is drawn."""
        from fedtune.models.whole import attach

        return attach(base, self.name)

    def save(self, adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
        """Write a model folder that transformers loads, with the tokenizer."""
        from fedtune.models.whole import save

        save(adapted, state, folder)

    def opened(self, folder: Path) -> FolderPlain:
        """Open a model folder, tensor by tensor."""
        from fedtune.models.folder import whole_folder

        return whole_folder(folder, self.name)
