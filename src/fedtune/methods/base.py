"""What a federated method is: a client half and a server half, pure functions over adapter states.

A method sees neither Flower nor disk nor the base model. A new one is a subclass in a file of its own that
overrides only what differs from the weighted mean of the factors; see docs/add-a-method.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fedtune.config.schema import Section

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState


@dataclass(frozen=True)
class ClientUpdate:
    """One client's screened update: the tensors it sent, by name, and how many examples stand behind them."""

    client: int
    tensors: Mapping[str, Tensor]
    examples: int


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round; all of it is in the checkpoint.

    Attributes:
        adapter: the global adapter.
        round: the last round that is in it (0: untouched).
        extra: a stateful method's own tensors, by name.
    """

    adapter: AdapterState
    round: int = 0
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class Method:
    """Weighted mean of the factors, and the hooks in which methods differ from it.

    Class attributes:
        name: on the command line, and the file's name.
        title, paper: for people.
        Parameters: the method's own settings, validated; an inert value is refused in `inert`.
        exact: the effective update is the weighted mean of the clients' effective updates.
        linear: the server needs only sums, so secure sums apply.
        mixed_ranks: clients may have different ranks.
        personalised: there is no single global model.
        stateful: the server keeps `extra` state.
        dora: its server half is defined for DoRA's magnitudes too.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    exact: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = False
    personalised: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    dora: ClassVar[bool] = False

    class Parameters(Section):
        """No settings of its own."""

    def __init__(self, parameters: Section) -> None:
        self.parameters = parameters

    @classmethod
    def inert(cls, parameters: Section) -> str:
        """Say why these settings would have no effect, or return an empty string."""
        return ""

    # client half

    def trainable(self, round_: int, name: str) -> bool:
        """Tell whether a tensor is trained, and sent, in a round."""
        return True

    def loss_term(self, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor | None:
        """Return what is added to the loss of each step, as a scalar; None for nothing.

        Args:
            now: the tensors in training.
            start: the same tensors as they were downloaded.
        """
        return None

    def payload(self, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], round_: int) -> dict[str, Tensor]:
        """Return what a client sends after its local training."""
        return {name: t for name, t in tensors.items() if self.trainable(round_, name)}

    # server half

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float]:
        """Return the weight of each update; they need not sum to 1."""
        return [float(u.examples) for u in updates]

    def combine(self, updates: Sequence[ClientUpdate], state: ServerState) -> dict[str, Tensor]:
        """Return the aggregate of the updates' tensors."""
        from fedtune.lora.algebra import weighted_mean

        return weighted_mean((u.tensors for u in updates), self.weights(updates))

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Return the state after a round; `updates` is not empty and sorted by client."""
        from fedtune.lora.state import to_tensors, with_tensors

        merged = {**to_tensors(state.adapter), **self.combine(updates, state)}
        return ServerState(with_tensors(state.adapter, merged), round_, state.extra)

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[int], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Aggregate whole adapters, as clients would send them after a round that started from `state`.

        Args:
            clients: their adapters; of different ranks only where the method allows it.
            examples: of each.
            state: the server's before.
            round_: which round.
            rank: of the result, where the method cuts ranks; ignored elsewhere.
        """
        from fedtune.lora.state import to_tensors

        start = to_tensors(state.adapter)
        updates = [
            ClientUpdate(i, self.payload(to_tensors(adapter), start, round_), n)
            for i, (adapter, n) in enumerate(zip(clients, examples, strict=True))
        ]
        return self.server_step(updates, state, round_)

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return what a client downloads at the start of a round.

        What is left out stands for the adapter's initial value, which every client makes from the run's seed.
        """
        from fedtune.lora.state import to_tensors

        return to_tensors(state.adapter)

    def expected(self, state: ServerState, client: int, round_: int) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and dtypes that a client must send."""
        from fedtune.lora.state import to_tensors

        return {n: t for n, t in to_tensors(state.adapter).items() if self.trainable(round_, n)}
