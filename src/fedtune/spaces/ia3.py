"""IA3: a vector that multiplies a layer's output, or a feed-forward layer's input (arXiv 2205.05638).

diag(l) W is linear in l, so the mean of clients' vectors is the model with the mean of their weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationInfo, field_validator

from fedtune.config import Config
from fedtune.config.schema import Section
from fedtune.spaces.base import Space

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState
    from fedtune.models.adapted import AdaptedModel
    from fedtune.models.load import LoadedModel


class IA3(Space):
    """One vector for each target layer."""

    name = "ia3"
    title = "(IA)3: learned vectors that rescale activations"
    paper = "arXiv:2205.05638"

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
