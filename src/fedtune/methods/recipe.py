"""A method with everything that goes around it: what the round loop and the clients really call.

Order on the client: SCAFFOLD and FedProx inside the steps, the method's payload, DoRA's map, an attacker. On the
server: DoRA's map, robust weights, the method's step, the server optimiser, SCAFFOLD's controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedtune.config import Config
from fedtune.methods import sound
from fedtune.methods.around import attack, drift, optimizer, robust
from fedtune.methods.around.weighing import reweighed
from fedtune.methods.base import ClientUpdate, Method, ServerState
from fedtune.methods.requests import ClientContext, Fitted, Program, RowNorms, Tensors
from fedtune.types import RunFailedError, UpdateError, derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState

_SERVER = "server/"
Note = Callable[[str], object]


def _unheard(text: str) -> None:
    """Take a note that nobody reads."""


@dataclass(frozen=True)
class Recipe:
    """A method and what the run's settings put around it."""

    method: Method
    config: Config

    @property
    def exact_dora(self) -> bool:
        """Whether magnitudes travel through the exact map."""
        return self.config.lora.dora and self.method.dora == "exact"

    @property
    def varying(self) -> bool:
        """Whether the bytes of a round depend on the rounds before it."""
        kind = self.method
        return kind.keeps_base or kind.ragged or kind.phases > 1 or (kind.stateful and kind.private)

    @property
    def streams(self) -> bool:
        """Whether updates may be added up as they come: nothing compares them, and nothing else comes with them."""
        robust = self.config.robust
        plain = robust.rule == "none" and robust.clip_norm == "none"
        alone = self.method.running and not self.method.by_client
        return alone and plain and not self.exact_dora and not self.config.drift.scaffold

    def shortage(self, updates: int, refused: int = 0) -> str:
        """Say that there are too few updates for the robust rule to mean anything, or return an empty string.

        Args:
            updates: of the round that can be used.
            refused: how many more were refused for what they hold.
        """
        left = robust.remaining(self.config.robust, updates, refused)
        return f"{robust.needs(left)}; {updates} came" if updates < robust.fewest(left) and robust.counts(left) else ""

    @property
    def phases(self) -> int:
        """Exchanges a round."""
        return self.method.phases

    def initial(self, adapter: AdapterState) -> ServerState:
        """Return the server's state before the first round."""
        from fedtune.lora import dora
        from fedtune.lora.state import to_tensors, with_tensors

        if self.exact_dora:
            adapter = with_tensors(adapter, dora.unit(to_tensors(adapter)))
        return ServerState(adapter)

    # client half

    def begin(self, layout: AdapterState, download: Tensors, kept: Tensors, round_: int) -> dict[str, Tensor]:
        """Return all tensors of a client's model at the start of a round; magnitudes are relative under exact DoRA."""
        layout = self.initial(layout).adapter
        return self.method.begin(layout, drift.split(download)[0], drift.split(kept)[0], round_)

    def fit(self, client: ClientContext, download: Tensors) -> Program[Fitted]:
        """Do a client's work of one exchange."""
        sent, controls = drift.split(download)
        begun = self.begin(client.layout, sent, client.kept, client.round) if client.phase == 1 else dict(sent)
        start = yield from self._started(begun)
        fitted, more = yield from self._corrected(client, self.method.fit(client, start), controls)
        payload = yield from self._mapped(fitted.payload, start, begun)
        sending = yield from self._tampered(client, {**payload, **more.payload}, start, begun)
        return Fitted(sending, {**fitted.kept, **more.kept})

    def _corrected(
        self, client: ClientContext, program: Program[Fitted], controls: Tensors
    ) -> Program[tuple[Fitted, Fitted]]:
        """Run the method's program with drift corrections; also return what these send and keep."""
        settings = self.config.drift
        if settings.proximal_mu:
            program = drift.pulled(program, settings.proximal_mu)
        if not settings.scaffold:
            return (yield from program), Fitted({})
        own = drift.believed(drift.split(client.kept)[1], controls)
        fitted, changes = yield from drift.corrected(program, controls, own, client)
        kept = drift.keeping(own, changes, client.round) if changes else {}
        return fitted, Fitted(drift.named(changes), drift.named(kept))

    def _tampered(
        self, client: ClientContext, payload: dict[str, Tensor], start: Tensors, begun: Tensors
    ) -> Program[dict[str, Tensor]]:
        """Return what a client sends; an attacker compares it with its start in the form that is sent.

        Its magnitudes are those it would have sent or, where no server takes these, the nearest.
        """
        if client.client not in self.config.attack.clients:
            return payload
        from fedtune.lora import dora

        seed = derive_seed(self.config.seed, "attack", client.client, client.round)
        was = yield from self._mapped(dict(start), start, begun)
        bad = attack.tampered(payload, was, self.config.attack, client.client, seed)
        return dora.clamped(bad, begun) if self.config.lora.dora else bad

    def _started(self, begun: dict[str, Tensor]) -> Program[dict[str, Tensor]]:
        """Return a client's tensors with the magnitudes as PEFT has them."""
        from fedtune.lora import dora

        return dora.to_magnitudes(begun, (yield RowNorms(begun))) if self.exact_dora else begun

    def _mapped(self, payload: dict[str, Tensor], start: Tensors, begun: Tensors) -> Program[dict[str, Tensor]]:
        """Return trained tensors as they are sent; no magnitude is further from `begun` than is accepted."""
        from fedtune.lora import dora

        if self.exact_dora:
            return dora.to_wire(payload, (yield RowNorms({**start, **payload})), begun)
        return dora.clamped(payload, begun) if self.config.lora.dora else payload

    # server half

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return what a client downloads."""
        down = self.method.view(state, client)
        if self.config.drift.scaffold:
            down |= drift.named(drift.down(self._controls(state), client, self.config.federation.clients))
        return down

    def _controls(self, state: ServerState) -> dict[str, Tensor]:
        from fedtune.lora.state import to_tensors

        known = drift.split(state.extra)[1]
        return known or {n: t.new_zeros(t.shape) for n, t in to_tensors(state.adapter).items()}

    def expected(self, state: ServerState, client: int, round_: int) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and dtypes that a client must send, and about the size."""
        from fedtune.lora.state import to_tensors

        up = self.method.expected(state, client, round_)
        if not self.config.drift.scaffold:
            return up
        own = to_tensors(state.adapter)
        return up | drift.named({n: drift.decayed(own[n], self.config.train) for n in up})

    def growth(self, name: str) -> float:
        """Return by how much the norm of a tensor that a client sends may exceed that of what is expected.

        Of DoRA's magnitudes, and of B where it comes multiplied by them, `flaw` has bounds of its own.
        """
        if self.config.lora.dora and name.endswith((".lora_magnitude_vector", ".lora_B.weight")[: 1 + self.exact_dora]):
            return sound.LARGEST
        return drift.growth(self.config.train) if name.startswith(drift.CONTROL) else self.method.growth(name)

    def flaw(self, update: Tensors, state: ServerState, client: int, round_: int, steps: int) -> str:
        """Say what is wrong with an update whose names and dtypes are as expected, or return an empty string."""
        own = drift.split(update)[0]
        odd = sound.magnitude_problem(own, state.adapter, relative=self.exact_dora) if self.config.lora.dora else ""
        return odd or self.method.flaw(own, state, client, round_, steps)

    def middle(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Return the state for the next exchange of the same round."""
        self._check(updates, replace(state, round=round_ - 1))
        return self.method.middle(updates, state, round_)

    def server_step(
        self,
        updates: Sequence[ClientUpdate],
        state: ServerState,
        round_: int,
        refused: int = 0,
        note: Note = _unheard,
    ) -> ServerState:
        """Return the state after a round.

        Args:
            updates: not empty, and sorted by client.
            state: before it.
            round_: which.
            refused: how many more replies of the round were refused for what they hold.
            note: told what a robust rule did, for the round's record.

        Raises:
            UpdateError: a client's numbers cannot be aggregated; without it the others' can.
            RunFailedError: fewer updates than a robust rule needs.
        """
        # a method may draw what is frozen from the round's number, and rounds may have been skipped since the last step
        before = replace(state, round=round_ - 1)
        self._check(updates, before)
        changes = {u.client: drift.split(u.tensors)[1] for u in updates}
        updates = [replace(u, tensors=drift.split(u.tensors)[0]) for u in updates]
        updates = self._reweighed(updates, before, refused, note)
        updates, relative = self._divided(updates)
        after = self.method.server_step(updates, replace(state, extra=self._own(state)), round_)
        after = self._optimised(state, after, round_)
        return self._finished(state, after, relative, changes, round_)

    def _check(self, updates: Sequence[ClientUpdate], state: ServerState) -> None:
        """Look at every update before anything is made of them; a sum was looked at term by term as it came.

        Raises:
            UpdateError: the first client whose numbers cannot be taken.
        """
        for update in () if self.streams else updates:
            flaw = sound.number_problem(update.tensors)
            # where only means of factors are taken, the bounds on those are enough
            if not flaw and self.method.comparable and self.method.pairs and not self.method.running:
                flaw = sound.product_problem(self.method.completed(self._plain(update), state), state.adapter)
            if flaw:
                raise UpdateError(update.client, flaw)

    def _plain(self, update: ClientUpdate) -> ClientUpdate:
        """Return an update of the method's own tensors, B as it is in a model."""
        from fedtune.lora import dora

        own = drift.split(update.tensors)[0]
        return replace(update, tensors=dora.from_wire(own) if self.exact_dora else own)

    def _own(self, state: ServerState) -> dict[str, Tensor]:
        """Return the method's own extra state, without what belongs to what is around it."""
        return {n: t for n, t in state.extra.items() if not n.startswith((_SERVER, drift.CONTROL))}

    def _divided(self, updates: Sequence[ClientUpdate]) -> tuple[list[ClientUpdate], dict[str, Tensor]]:
        from fedtune.lora import dora

        if not self.exact_dora:
            return list(updates), {}
        tensors, relative = dora.divided([u.tensors for u in updates], self.method.weights(updates))
        return [replace(u, tensors=t) for u, t in zip(updates, tensors, strict=True)], relative

    def _reweighed(
        self, updates: Sequence[ClientUpdate], state: ServerState, refused: int, note: Note
    ) -> list[ClientUpdate]:
        """Return the updates with the weights a robust rule gives them; those without any are left out.

        Raises:
            RunFailedError: fewer updates than the rule needs.
        """
        settings = self.config.robust
        if settings.rule == "none" and settings.clip_norm == "none":
            return list(updates)
        if short := self.shortage(len(updates), refused):
            raise RunFailedError(short)
        left = robust.remaining(settings, len(updates), refused)
        if left.malicious < settings.malicious:
            caught = settings.malicious - left.malicious
            note(f"{caught} refused of the {settings.malicious} malicious: robust.malicious = {left.malicious} here")
        return reweighed(self.method, updates, state, left, note)

    def _optimised(self, before: ServerState, after: ServerState, round_: int) -> ServerState:
        from fedtune.lora import dora
        from fedtune.lora.state import to_tensors, with_tensors

        if self.config.server.optimizer == "none":
            return after
        memory = {n.removeprefix(_SERVER): t for n, t in before.extra.items() if n.startswith(_SERVER)}
        stepped, memory = optimizer.step(
            self.config.server,
            to_tensors(before.adapter),
            to_tensors(after.adapter),
            memory,
            round_,
            lambda name: self.method.trainable(round_, name),
        )
        if self.config.lora.dora:
            stepped = dora.clamped(stepped, to_tensors(before.adapter))
        extra = {**after.extra, **{_SERVER + n: t for n, t in memory.items()}}
        return replace(after, adapter=with_tensors(after.adapter, stepped), extra=extra)

    def _finished(
        self, before: ServerState, after: ServerState, relative: Tensors, changes: Mapping[int, Tensors], round_: int
    ) -> ServerState:
        """Set the relative magnitudes, and SCAFFOLD's controls."""
        from fedtune.lora.state import to_tensors, with_tensors

        if relative:
            after = replace(after, adapter=with_tensors(after.adapter, {**to_tensors(after.adapter), **relative}))
        if not self.config.drift.scaffold:
            return after
        controls = drift.new_controls(self._controls(before), changes, round_, self.config.federation.clients)
        controls = drift.bounded(controls, to_tensors(before.adapter), self.config.train)
        return replace(after, extra={**after.extra, **drift.named(controls)})
