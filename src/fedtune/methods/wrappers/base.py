"""What a wrapper around a method is: the same calls, passed on to what is inside, changed on the way in or out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedtune.config.section import Section
from fedtune.lora.state import AdapterState
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors
from fedtune.methods.state import ClientUpdate, ServerState, Upload
from fedtune.types import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config

Note = Callable[[str], object]
# a setting and why it has no effect
Idle = Iterable[tuple[str, str]]
# lists the methods of which something is true
Having = Callable[[Callable[[type[Method]], object]], str]


def unheard(text: str) -> None:
    """Take a note that nobody reads."""


@dataclass(frozen=True)
class RoundContext:
    """What the server knows of a round beside its updates.

    Attributes:
        round: its number.
        refused: how many more replies were refused for what they hold.
        note: takes remarks for the round's record.
    """

    round: int
    refused: int = 0
    note: Note = unheard


class Innermost:
    """The method itself, with the calls that wrappers pass on."""

    def __init__(self, method: Method, config: Config) -> None:
        self.method, self.config = method, config

    @property
    def linear(self) -> bool:
        """Whether updates may be added up as they come: nothing compares them, and nothing else comes with them."""
        return self.method.linear

    def initial(self, adapter: AdapterState) -> ServerState:
        """Return the server's state before the first round."""
        return ServerState(adapter)

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Return all tensors of a client's model at the start of an exchange, as they travel."""
        if client.phase > 1:
            return dict(download)
        return self.method.begin(client, download)

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Do a client's work of one exchange from what `begin` returned."""
        return self.method.fit(client, start)

    def work(self, client: ClientContext, download: Tensors) -> Program[Fitted]:
        """Do a client's work of one exchange from what it downloaded."""
        return self.fit(client, self.begin(client, download))

    def untrained(self, start: Tensors) -> Program[dict[str, Tensor]]:
        """Return what `start` is in the form in which it would be sent."""
        yield from ()
        return dict(start)

    def loadable(self, tensors: Tensors) -> Program[dict[str, Tensor]]:
        """Return tensors of a model as PEFT has them."""
        yield from ()
        return dict(tensors)

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return what a client downloads."""
        return self.method.view(state, client)

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Return what a client has to send in a round of so many optimiser steps."""
        return self.method.upload(state, client, round_, steps)

    def shortage(self, updates: int, refused: int = 0) -> str:
        """Say that there are too few updates for a robust rule to mean anything, or return an empty string.

        Args:
            updates: of the round that can be used.
            refused: how many more were refused for what they hold.
        """
        return ""

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Return the state after an exchange."""
        return self.method.server_step(updates, state, context.round)


class Wrapper(Innermost):
    """Passes everything on; a wrapper overrides what it changes.

    What it keeps on the server is `state.memory[name]`; what it sends, and keeps on clients, has `name/` before it.

    Class attributes:
        name: of its memory, and in listings.
        one_by_one: its server step needs the updates one by one, and not only their weighted mean.
        Parameters: the settings in `wrappers.<name>`, of a wrapper of another package; ours have sections of their own.
    """

    name: ClassVar[str]
    one_by_one = False

    class Parameters(Section):
        """No settings of its own."""

    def __init__(self, inner: Innermost) -> None:
        super().__init__(inner.method, inner.config)
        self.inner = inner
        self.parameters = self.Parameters.model_validate(inner.config.wrappers.get(self.name, {}))

    @classmethod
    def asked(cls, config: Config, kind: type[Method]) -> bool:
        """Tell whether the settings ask for it; by default they do where they name it."""
        return cls.name in config.wrappers

    @classmethod
    def problems(cls, config: Config, kind: type[Method], having: Having) -> Iterable[Problem]:
        """Yield what it does not go together with, where the settings ask for it.

        Args:
            config: the run's settings.
            kind: the method.
            having: lists the methods of which something is true.
        """
        return ()

    @classmethod
    def idle(cls, config: Config, kind: type[Method]) -> Idle:
        """Yield its settings that have no effect beside the others, asked for or not."""
        return ()

    @property
    def linear(self) -> bool:
        """Whether updates may be added up as they come."""
        return self.inner.linear and not self.one_by_one

    def initial(self, adapter: AdapterState) -> ServerState:
        """Return the server's state before the first round."""
        return self.inner.initial(adapter)

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Return all tensors of a client's model at the start of an exchange, as they travel."""
        return self.inner.begin(client, download)

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Do a client's work of one exchange from what `begin` returned."""
        return self.inner.fit(client, start)

    def untrained(self, start: Tensors) -> Program[dict[str, Tensor]]:
        """Return what `start` is in the form in which it would be sent."""
        return self.inner.untrained(start)

    def loadable(self, tensors: Tensors) -> Program[dict[str, Tensor]]:
        """Return tensors of a model as PEFT has them."""
        return self.inner.loadable(tensors)

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return what a client downloads."""
        return self.inner.view(state, client)

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Return what a client has to send in a round of so many optimiser steps."""
        return self.inner.upload(state, client, round_, steps)

    def shortage(self, updates: int, refused: int = 0) -> str:
        """Say that there are too few updates for a robust rule to mean anything, or return an empty string."""
        return self.inner.shortage(updates, refused)

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Return the state after an exchange."""
        return self.inner.server_step(updates, state, context)
