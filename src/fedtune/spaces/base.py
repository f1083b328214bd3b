"""What a space is: what is trained of a model or beside it, and how it lies in messages, memory and files.

Its states are adapters of factors (`LoraModule` by layer), which have ranks and products, or a `Plain`: named tensors
of any kind. A space sees the base model; methods see only its states. A new one is a subclass in a file of its own;
see docs/add-a-space.md. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedtune.config import Config
from fedtune.config.section import Section
from fedtune.types import Problem

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState
    from fedtune.models.adapted import AdaptedModel
    from fedtune.models.adapter_config import AdapterConfig
    from fedtune.models.folder import FolderPlain, FolderState
    from fedtune.models.load import LoadedModel
    from fedtune.results.entry import Entry
    from fedtune.spaces.saved import Layers


class Space:
    """What is trained, and where it is put.

    Class attributes:
        name: as in `peft.kind`, and the file's name.
        title, paper: for people.
        Parameters: the space's own settings in the section `peft`.
        folder: of a run, in which the trained state is saved.
        factored: its states are layers of factors, which have ranks and products, and lie side by side in one pass.
        whole: its states are weights of the model: a client must not move one further than its optimiser can.
        unsubmitted: why a run's folder cannot be checked and submitted; empty where the last four hooks say how.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    folder: ClassVar[str] = "adapter"
    factored: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    unsubmitted: ClassVar[str] = "what its runs leave is not known here, so they cannot be submitted"

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

    # of a submission, whose files are a stranger's and are read by their headers alone

    def layers(self, header: Mapping[str, Any]) -> Layers:
        """Return what an adapter's file has for each layer of the base model.

        Args:
            header: of the file, as `tensor_header` returns it.

        Raises:
            AdapterError: tensors that no run leaves.
        """
        raise NotImplementedError(f"{self.name} does not say what lies in its files")

    def on_base(self, entry: Entry) -> Layers | None:
        """Return the layers that a run's settings make on its base model; None where that is not known here."""
        return None

    def numbers(self, shape: Sequence[int], config: Config) -> tuple[int, int, int]:
        """Return how many parameters a layer trains: of A, of B or any other that is sent, and beside them."""
        raise NotImplementedError(f"{self.name} does not say how many parameters a layer has")

    def saved_problems(
        self, config: AdapterConfig, layers: Layers, entry: Entry, *, grown: bool
    ) -> Iterator[tuple[str, str]]:
        """Yield files that no run of an entry's settings leaves, by name, each with the reason.

        Args:
            config: the adapter's settings.
            layers: what `layers` found in its file.
            entry: of the run.
            grown: it holds what a method moved into the base model, too.
        """
        yield from ()
