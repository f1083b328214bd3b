"""What a space is: what is trained of a model or beside it, and how it lies in messages, memory and files.

Its states are adapters of factors (`LoraModule` by layer), which have ranks and products, or a `Plain`: named tensors
of any kind. A space sees the base model; methods see only its states. A new one is a subclass in a file of its own;
see docs/add-a-space.md. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedtune.config import Config
from fedtune.config.schema import Section
from fedtune.types import Problem

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState
    from fedtune.models.adapted import AdaptedModel
    from fedtune.models.folder import FolderPlain, FolderState
    from fedtune.models.load import LoadedModel


class Space:
    """What is trained, and where it is put.

    Class attributes:
        name: as in `peft.kind`, and the file's name.
        title, paper: for people.
        Parameters: the space's own settings in the section `peft`.
        folder: of a run, in which the trained state is saved.
        factored: its states are layers of factors, which have ranks and products, and lie side by side in one pass.
        whole: its states are weights of the model: a client must not move one further than its optimiser can.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    folder: ClassVar[str] = "adapter"
    factored: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    class Parameters(Section):
        """No settings of its own."""

    def problems(self, config: Config) -> Iterator[Problem]:
        """Yield what does not go together with this space, known before anything is loaded."""
        yield from ()

    def attach(self, base: LoadedModel, config: Config, seed: int) -> AdaptedModel:
        """Put a fresh state of this space on a base model; the same seed gives the same state.

        Raises:
            ModelError: the model cannot be trained so.
        """
        raise NotImplementedError(f"{self.name} does not say how it is attached")

    def save(self, adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
        """Write a folder that the libraries of the field load, and `fedtune eval`."""
        raise NotImplementedError(f"{self.name} does not say how it is saved")

    def opened(self, folder: Path) -> FolderState | FolderPlain:
        """Open what `save` wrote, or anybody else, as a state whose tensors are read when they are asked for.

        Raises:
            FedtuneError: it is not safe to read, or no state of this space.
        """
        raise NotImplementedError(f"{self.name} does not say how its folders are read")
