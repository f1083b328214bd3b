"""What a wrapper around a method is: the same calls, passed on to what is inside, changed on the way in or out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from fedtune.config.section import Section
from fedtune.lora.state import AdapterState
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Upload
from fedtune.types import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config

# a setting and why it has no effect
Idle = Iterable[tuple[str, str]]
# lists the methods of which something is true
Having = Callable[[Callable[[type[Method]], object]], str]


class Wrapper:
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

    def __init__(self, inner: Method | Wrapper, config: Config) -> None:
        self.inner, self.config = inner, config
        self.method: Method = inner.method if isinstance(inner, Wrapper) else inner
        self.parameters = self.Parameters.model_validate(config.wrappers.get(self.name, {}))

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
        """Whether updates may be added up as they come: nothing compares them, and nothing else comes with them."""
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
