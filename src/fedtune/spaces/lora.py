"""LoRA: low-rank factors beside frozen weights (arXiv 2106.09685); rsLoRA and DoRA by the settings in `lora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config import Config
from fedtune.spaces.base import Space

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState
    from fedtune.models.adapted import AdaptedModel
    from fedtune.models.folder import FolderState
    from fedtune.models.load import LoadedModel


class Lora(Space):
    """Factors A and B of each target layer."""

    name = "lora"
    title = "LoRA, rsLoRA, DoRA"
    paper = "arXiv:2106.09685"
    factored = True

    def attach(self, base: LoadedModel, config: Config, seed: int) -> AdaptedModel:
        """Put a fresh adapter on the layers of `lora.target_modules`."""
        from fedtune.models.adapter import attach

        return attach(base, config.lora, seed)

    def save(self, adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
        """Write a PEFT folder."""
        from fedtune.models.adapter import save

        save(adapted, state, folder)

    def opened(self, folder: Path) -> FolderState:
        """Open a PEFT folder, layer by layer."""
        from fedtune.models.folder import FolderState

        return FolderState(folder)
