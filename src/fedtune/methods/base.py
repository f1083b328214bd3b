"""What a federated method is: a client half and a server half, pure functions over adapter states.

A method sees neither Flower nor disk nor the base model. A new one is a subclass in a file of its own that overrides
only what differs from the weighted mean of the factors; see docs/add-a-method.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedtune.config.section import Section
from fedtune.lora.state import AdapterState, to_tensors, with_rank, with_tensors
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors, Train
from fedtune.methods.sound import reach
from fedtune.methods.state import ClientUpdate, RoundContext, RunContext, ServerState, Sizes, Upload, mean

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config

# the spaces of a method that takes a state's tensors as they are, whatever they stand for
ANY = frozenset({"any"})
# LoRA, and LoRA with DoRA's magnitudes through the exact map of `lora.dora`
DORA = frozenset({"lora", "dora"})


class Method:
    """Weighted mean of the factors, and the hooks in which methods differ from it.

    Class attributes that say what it is:
        name: on the command line, and the file's name.
        title, paper: for people.
        guarantee: "exact" where the effective update is the weighted mean of the clients' effective updates, "fixed
            point" where identical clients stay what they are, "none"; the property suite holds it to that.
        Parameters: the method's own settings, validated.

    Traits, which decide what it goes together with:
        spaces: in which it is defined: on layers of factors by default, in `ANY` space where it takes means alone.
        mixed_ranks: clients may have different ranks.
        models: "global" is one for all, "own" one for each client and nothing else, "both" one for each client made
            with a global one.
        updates: an update stands for a "model", which can be compared with others; only its "product", with its
            weight, reaches the global model, so robust rules hold of that too; or neither, it is "opaque".
        steady: parameters keep their meaning between rounds, so a server optimiser may hold state for them.
        linear: the server step needs only the weighted mean of the updates, so that they are added up one after the
            other, and secure sums apply. Not so where `server_step` is overridden, unless the class says so.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    guarantee: ClassVar[Literal["exact", "fixed point", "none"]] = "fixed point"
    spaces: ClassVar[frozenset[str]] = frozenset({"lora"})
    mixed_ranks: ClassVar[bool] = False
    models: ClassVar[Literal["global", "own", "both"]] = "global"
    updates: ClassVar[Literal["model", "product", "opaque"]] = "model"
    steady: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    class Parameters(Section):
        """No settings of its own."""

        def inert(self) -> str:
            """Say why these settings would have no effect, or return an empty string."""
            return ""

        def idle(self, config: Config) -> Iterator[tuple[str, str]]:
            """Yield settings of a run that have no effect with the method, by dotted name, each with the reason."""
            yield from ()

    parameters: Parameters

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "server_step" in vars(cls):
            cls.linear = vars(cls).get("linear", False)

    def __init__(self, parameters: Parameters, run: RunContext | None = None) -> None:
        self.parameters = parameters
        self.run = run or RunContext()

    @property
    def seed(self) -> int:
        """The run's seed, of everything that all parties draw alike."""
        return self.run.seed

    @property
    def in_run(self) -> bool:
        """Whether clients send what they send in a run; outside of one, adapters that anybody made stand for it."""
        return self.run.rank > 0

    def cut(self, adapter: AdapterState, client: int) -> AdapterState:
        """Return an adapter with the rank that a client has."""
        rank = self.run.ranks.get(client)
        return adapter if rank is None else {path: with_rank(m, rank) for path, m in adapter.items()}

    def adapters(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> list[AdapterState]:
        """Return the updates of a round as whole adapters."""
        return [self.upload(state, u.client, round_).whole(u.tensors) for u in updates]

    # hooks of both halves

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """Return how many numbers a client sends, and receives, for one module in a round of the steady state."""
        return sizes.a + sizes.b, sizes.a + sizes.b

    def trainable(self, round_: int, name: str) -> bool:
        """Tell whether a tensor of the global adapter is trained in a round; if not, all clients have the same."""
        return True

    # hooks of the client half

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Return all tensors a client's model has at the start of a round; `download` is what `view` sent."""
        return {**to_tensors(client.layout), **download}

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Do a client's work of one round: train what is trainable from `start`; return what it sends and keeps."""
        own = to_tensors(client.layout)
        names = [n for n in start if n in own and self.trainable(client.round, n)]
        trained = yield Train(start, names)
        return Fitted(self.payload({n: trained[n] for n in own}, start, client.round))

    def payload(self, trained: Tensors, start: Tensors, round_: int) -> dict[str, Tensor]:
        """Return what a client sends of its trained adapter."""
        return {name: t for name, t in trained.items() if self.trainable(round_, name)}

    # hooks of the server half

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return what a client downloads at the start of a round.

        What is left out stands for the adapter's initial value, which every client makes from the run's seed.
        """
        return to_tensors(self.cut(state.adapter, client))

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Return what a client has to send in a round of so many optimiser steps."""
        like = self.cut(state.adapter, client)
        own = to_tensors(like)
        sent = {n: t for n, t in own.items() if self.trainable(round_, n)}
        known = self.steady and self.models == "global"
        return Upload(
            sent,
            lambda tensors: with_tensors(like, {**own, **tensors}),
            steps,
            reach=(lambda train, rate: reach(train, rate, steps)) if known else None,
        )

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Return the state after an exchange.

        A state whose `round` is not yet the context's asks the clients of these updates for another exchange of it.

        Args:
            updates: not empty, and sorted by client.
            state: before it.
            context: the round; some may have been skipped since `state.round`.
        """
        whole = {**to_tensors(state.adapter), **mean(updates)}
        return replace(state, adapter=with_tensors(state.adapter, whole), round=context.round)

    # what wrappers change

    def initial(self, adapter: AdapterState) -> ServerState:
        """Return the server's state before the first round."""
        return ServerState(adapter)

    def untrained(self, start: Tensors) -> Program[dict[str, Tensor]]:
        """Return what `begin` returned in the form in which it would be sent."""
        yield from ()
        return dict(start)

    def loadable(self, tensors: Tensors) -> Program[dict[str, Tensor]]:
        """Return tensors of a model as PEFT has them."""
        yield from ()
        return dict(tensors)

    def shortage(self, updates: int, refused: int = 0) -> str:
        """Say that there are too few updates for a robust rule to mean anything, or return an empty string.

        Args:
            updates: of the round that can be used.
            refused: how many more were refused for what they hold.
        """
        return ""
