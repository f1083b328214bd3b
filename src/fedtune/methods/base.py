"""What a federated method is: a client half and a server half, pure functions over adapter states.

A method sees neither Flower nor disk nor the base model. A new one is a subclass in a file of its own that overrides
only what differs from the weighted mean of the factors; see docs/add-a-method.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from fedtune.config.schema import Section
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors, Train
from fedtune.methods.state import ClientUpdate, Scene, ServerState, Sizes

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config.schema import TrainSettings
    from fedtune.lora.state import AdapterState
    from fedtune.methods.sound import Reach

# the spaces of a method that takes a state's tensors as they are, whatever they stand for
ANY = frozenset({"any"})


class Method:
    """Weighted mean of the factors, and the hooks in which methods differ from it.

    Class attributes:
        name: on the command line, and the file's name.
        title, paper: for people.
        Parameters: the method's own settings, validated; its `inert` refuses values without effect.
        exact: the effective update is the weighted mean of the clients' effective updates.
        linear: the server needs only sums, so secure sums apply.
        mixed_ranks: clients may have different ranks.
        cuts: an aggregation of folders can be cut to a rank that is asked for.
        personalised: there is no single global model.
        global_adapter: the server's adapter is a model of its own (not so where only one factor is shared).
        keeps_base: it moves the base model by low-rank side adapters.
        stateful: the server keeps `extra` state.
        private: clients keep tensors of their own between rounds.
        dora: "" (not defined for DoRA), "mean" (magnitudes averaged like factors), "exact" (by the map of `lora.dora`).
        factors: what is trained is the global adapter's own tensors, in coordinates that stay (for server optimisers).
        comparable: an update stands for a model, so it can be compared with others and with the ideal update.
        by_product: only an update's product, with its weight, reaches the model; so robust rules hold of the model.
        pairs: a client sends both factors of a layer, so it is free to choose their gauge.
        optimises: clients make optimiser steps.
        ragged: the shapes a client sends are its own choice, within what `flaw` allows.
        running: the server step needs only the updates' weighted mean, so they are added up one after the other.
        by_client: the server step also uses whose update has which weight, so a run keeps updates apart even then.
        phases: exchanges a round.
        spaces: in which it is defined: on layers of factors by default, in `ANY` space where it takes means alone.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    exact: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = False
    cuts: ClassVar[bool] = False
    personalised: ClassVar[bool] = False
    global_adapter: ClassVar[bool] = True
    keeps_base: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    private: ClassVar[bool] = False
    dora: ClassVar[str] = ""
    factors: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    by_product: ClassVar[bool] = False
    pairs: ClassVar[bool] = True
    optimises: ClassVar[bool] = True
    ragged: ClassVar[bool] = False
    running: ClassVar[bool] = False
    by_client: ClassVar[bool] = False
    phases: ClassVar[int] = 1
    spaces: ClassVar[frozenset[str]] = frozenset({"lora"})

    class Parameters(Section):
        """No settings of its own."""

        def inert(self) -> str:
            """Say why these settings would have no effect, or return an empty string."""
            return ""

    parameters: Parameters

    def __init__(self, parameters: Parameters, scene: Scene | None = None) -> None:
        self.parameters = parameters
        self.scene = scene or Scene()

    @property
    def seed(self) -> int:
        """The run's seed, of everything that all parties draw alike."""
        return self.scene.seed

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """Return how many numbers a client sends, and receives, for one module in a round of the steady state."""
        return sizes.a + sizes.b, sizes.a + sizes.b

    # client half

    def trainable(self, round_: int, name: str) -> bool:
        """Tell whether a tensor is trained, and sent, in a round."""
        return True

    def begin(self, layout: AdapterState, download: Tensors, kept: Tensors, round_: int) -> dict[str, Tensor]:
        """Return all tensors a client's model has at the start of a round.

        Args:
            layout: the adapter of the client's rank as the run's seed made it, on every client the same.
            download: what `view` sent.
            kept: what this client kept in its last round.
            round_: which round.
        """
        from fedtune.lora.state import to_tensors

        return {**to_tensors(layout), **download}

    def loss_term(self, now: Tensors, start: Tensors) -> Tensor | None:
        """Return what is added to the loss of each step, as a scalar; None for nothing.

        Args:
            now: the tensors in training.
            start: the same tensors as they were downloaded.
        """
        return None

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Do a client's work of one round: train what is trainable from `start`; return what it sends and keeps."""
        names = [n for n in start if self.trainable(client.round, n)]
        trained = yield Train(start, names, lambda now: self.loss_term(now, start))
        return Fitted(self.payload(trained, start, client.round))

    def payload(self, tensors: Tensors, start: Tensors, round_: int) -> dict[str, Tensor]:
        """Return what a client sends after its local training."""
        return {name: t for name, t in tensors.items() if self.trainable(round_, name)}

    def losses(self, steps: int) -> int:
        """Return how many losses a client takes in a round whose plan has so many steps, at most."""
        return steps

    # server half

    def rank_of(self, client: int) -> int | None:
        """Return the rank of a client's adapter, or None where all have the global one."""
        return self.scene.ranks.get(client)

    def cut(self, adapter: AdapterState, client: int) -> AdapterState:
        """Return an adapter with the rank that a client has."""
        from fedtune.lora.state import with_rank

        rank = self.rank_of(client)
        return adapter if rank is None else {path: with_rank(m, rank) for path, m in adapter.items()}

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float]:
        """Return the weight of each update; they need not sum to 1."""
        return [float(u.examples) for u in updates]

    def completed(self, update: ClientUpdate, state: ServerState) -> AdapterState:
        """Return an update as a whole adapter: what was not sent is as the server has it.

        `state.round` is the round before the update's.
        """
        from fedtune.lora.state import to_tensors, with_tensors

        like = self.cut(state.adapter, update.client)
        return with_tensors(like, {**to_tensors(like), **update.tensors})

    def combine(self, updates: Sequence[ClientUpdate], state: ServerState) -> dict[str, Tensor]:
        """Return the aggregate of the updates' tensors."""
        from fedtune.lora.algebra import weighted_mean

        return weighted_mean((u.tensors for u in updates), self.weights(updates))

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Return the state after a round; `updates` is not empty and sorted by client."""
        from fedtune.lora.state import to_tensors, with_tensors

        merged = {**to_tensors(state.adapter), **self.combine(updates, state)}
        return replace(state, adapter=with_tensors(state.adapter, merged), round=round_)

    def middle(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Return the state in which the next exchange of the same round is made (`phases` above 1)."""
        raise NotImplementedError(f"{self.name} has one exchange a round")

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Aggregate whole adapters, as clients would send them after a round that started from `state`.

        Args:
            clients: their adapters, of one rank; read once, one at a time. B takes up a difference of scales.
            examples: of each.
            state: the server's before.
            round_: which round.
            rank: of the result, where the method `cuts`; 0 is the largest of the clients.
        """
        from fedtune.lora.algebra import weighted_mean
        from fedtune.lora.state import rescaled, to_tensors

        start = to_tensors(state.adapter)

        def sent(adapter: AdapterState) -> Tensors:
            fitting = {path: rescaled(m, state.adapter[path]) for path, m in adapter.items()}
            return self.payload(to_tensors(fitting), start, round_)

        if self.running:
            mean = weighted_mean((sent(c) for c in clients), examples)
            return self.server_step([ClientUpdate(0, mean, 1.0)], state, round_)
        updates = [ClientUpdate(i, sent(c), n) for i, (c, n) in enumerate(zip(clients, examples, strict=True))]
        return self.server_step(updates, state, round_)

    def personal(
        self, clients: Sequence[AdapterState], examples: Sequence[float], after: ServerState
    ) -> Iterator[AdapterState] | None:
        """Return what each client gets of an aggregation, where that is not one global adapter; else None."""
        return None

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return what a client downloads at the start of a round.

        What is left out stands for the adapter's initial value, which every client makes from the run's seed.
        """
        from fedtune.lora.state import to_tensors

        return to_tensors(self.cut(state.adapter, client))

    def expected(self, state: ServerState, client: int, round_: int) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and dtypes that a client must send."""
        from fedtune.lora.state import to_tensors

        adapter = to_tensors(self.cut(state.adapter, client))
        return {n: t for n, t in adapter.items() if self.trainable(round_, n)}

    def growth(self, name: str) -> float:
        """Return by how much the norm of a tensor that a client sends may exceed that of what is expected."""
        from fedtune.methods.sound import GROWTH

        return GROWTH

    def reach(self, train: TrainSettings, rate: float, steps: int) -> Reach | None:
        """Return how far a round can carry a weight of the model from what was sent; None where nobody can say.

        Args:
            train: the optimiser.
            rate: the round's learning rate.
            steps: of the round's plan.
        """
        from fedtune.methods.sound import reach

        known = self.factors and self.optimises and not self.private
        return reach(train, rate, self.losses(steps)) if known else None

    def common(self, round_: int, name: str) -> bool:
        """Tell whether a tensor has to be the same in all adapters that are aggregated after a round."""
        return not self.trainable(round_, name)

    def flaw(self, update: Tensors, state: ServerState, client: int, round_: int, steps: int) -> str:
        """Say what is wrong with an update of a plan of so many steps, or return an empty string.

        Names and dtypes are those of `expected`; so are the shapes where a method is not `ragged`.
        """
        return ""
