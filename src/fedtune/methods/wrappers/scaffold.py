"""SCAFFOLD: control variates that correct the drift of clients (arXiv 1910.06378)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fedtune.lazy import torch
from fedtune.lora.algebra import weighted_mean
from fedtune.lora.state import to_tensors
from fedtune.methods.base import Method
from fedtune.methods.kept import as_of, with_previous
from fedtune.methods.requests import ClientContext, Correction, Fitted, Program, Request, Tensors, Train, handled
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Upload
from fedtune.methods.wrappers.base import Having, Wrapper
from fedtune.types import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config
    from fedtune.config.schema import TrainSettings

T = TypeVar("T")
CONTROL = "scaffold/"
# how large a control's change may be, in multiples of what gradients are clipped to
CLIPPED = 10.0
# among the controls: the round a client was last heard in (server, by client; download)
_HEARD = "heard"


def split(tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a message's own tensors, and SCAFFOLD's among them without their prefix."""
    own = {n: t for n, t in tensors.items() if not n.startswith(CONTROL)}
    return own, {n.removeprefix(CONTROL): t for n, t in tensors.items() if n.startswith(CONTROL)}


def named(controls: Tensors) -> dict[str, Tensor]:
    """Return control variates under their names on the wire."""
    return {CONTROL + n: t for n, t in controls.items()}


def corrected(
    program: Program[T], server: Tensors, own: Tensors, client: ClientContext
) -> Program[tuple[T, dict[str, Tensor]]]:
    """Run a program with SCAFFOLD's correction of every step; also return how each control changed: c_i+ - c_i.

    Option II of SCAFFOLD: c_i+ = c_i - c + (x - y_i) / (K lr). That is the mean of the gradients the client's steps
    were made of, clipped, and is made of their sum: at a small rate x - y_i has hardly a digit left in float32. Weight
    decay is left out of it: it is the same function on all clients, so it makes no drift, and no control grows with
    the model. A round with a rate of 0 makes no steps: the controls stay.

    Args:
        program: the client's.
        server: c.
        own: c_i.
        client: how many steps it makes, and at what rate.
    """
    changes: dict[str, Tensor] = {}

    def handle(request: Request) -> Program[Any]:
        if not isinstance(request, Train):
            return (yield request)
        drift = Correction({n: server[n] - own[n] if n in own else server[n] for n in request.names if n in server})
        trained = yield replace(request, correction=drift)
        for name in drift:
            zero = server[name].new_zeros(request.start[name].shape)  # in the server's dtype, whatever the model's
            mean = drift.sums[name].to(zero.device, zero.dtype) / client.steps if name in drift.sums else zero
            changes[name] = mean - own.get(name, zero) if client.rate else zero
        return trained

    result = yield from handled(program, handle)
    return result, changes


def heard(controls: Tensors, clients: int) -> Tensor:
    """Return the round in which each client was last heard, int64 [clients]; 0 for never."""
    return controls[_HEARD] if _HEARD in controls else torch.zeros(clients, dtype=torch.int64)


def bounded(controls: Tensors, train: TrainSettings) -> dict[str, Tensor]:
    """Return controls no larger than the mean of the clients' can be, each a mean of clipped gradients.

    Only changes that no training makes can have moved c further; every honest step would go along with it.

    Args:
        controls: c, and when clients were heard.
        train: to what gradients are clipped.
    """
    found = dict(controls)
    for name in controls.keys() - {_HEARD}:
        if (norm := float(controls[name].norm())) > train.max_grad_norm:
            found[name] = controls[name] * (train.max_grad_norm / norm)
    return found


def correcting(train: TrainSettings) -> TrainSettings:
    """Return settings whose plain steps reach as far as these do with c - c_i, each of a clipped gradient's size."""
    return train.model_copy(update={"max_grad_norm": 3 * train.max_grad_norm})


def new_controls(controls: Tensors, changes: Mapping[int, Tensors], round_: int, clients: int) -> dict[str, Tensor]:
    """Return the server's controls: c + |S|/N mean(c_i+ - c_i).

    Args:
        controls: c.
        changes: c_i+ - c_i of each client that was heard.
        round_: now.
        clients: N.
    """
    mean = weighted_mean(list(changes.values()), [1.0] * len(changes))
    known = heard(controls, clients).clone()
    known[list(changes)] = round_
    moved = {n: c + len(changes) / clients * mean[n] if n in mean else c for n, c in controls.items()}
    return {**moved, _HEARD: known}


class Scaffold(Wrapper):
    """Corrects every step; the server carries c, each client its c_i."""

    name = "scaffold"
    one_by_one = True

    @classmethod
    def asked(cls, config: Config, kind: type[Method]) -> bool:
        """With `drift.scaffold`."""
        return config.drift.scaffold

    @classmethod
    def problems(cls, config: Config, kind: type[Method], having: Having) -> Iterable[Problem]:
        """Refuse optimisers whose steps are no gradients, and methods whose tensors mean something else each round."""
        if config.train.optimizer != "sgd":
            yield Problem("drift.scaffold", "is defined for SGD only", "set train.optimizer = sgd")
        if not kind.steady or kind.models != "global" or config.lora.ranks or config.lora.dora:
            yield Problem("drift.scaffold", f"its control variates do not fit {kind.name} with these settings")

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Begin with the server's controls beside the model."""
        sent, controls = split(download)
        return {**self.inner.begin(replace(client, kept=split(client.kept)[0]), sent), **named(controls)}

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train with the correction c - c_i; send how c_i has changed, and keep it."""
        model, controls = split(start)
        kept, own = split(client.kept)
        own = as_of(own, int(controls[_HEARD]))
        program = self.inner.fit(replace(client, kept=kept), model)
        fitted, changes = yield from corrected(program, controls, own, client)
        if not changes:
            return fitted
        new = {n: own[n] + t if n in own else t for n, t in changes.items()}
        # with those to go back to: else c is not the mean of all c_i after a reply that was lost, and stays biased
        keeps = with_previous({**own, **new}, own, client.round)
        return Fitted({**fitted.payload, **named(changes)}, {**fitted.kept, **named(keeps)})

    def untrained(self, start: Tensors) -> Program[dict[str, Tensor]]:
        """Return the model's start: a control's change has none."""
        return self.inner.untrained(split(start)[0])

    def _controls(self, state: ServerState) -> Mapping[str, Tensor]:
        zeros = {n: t.new_zeros(t.shape) for n, t in to_tensors(state.adapter).items()}
        return state.memory.get(self.name) or zeros

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send c as well, and the round in which the client was last heard."""
        controls = self._controls(state)
        last = heard(controls, self.config.federation.clients)[client].clone()
        return {**self.inner.view(state, client), **named({**controls, _HEARD: last})}

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Expect a change of the control of every tensor that is sent, bounded by what gradients are clipped to."""
        inner, train = self.inner.upload(state, client, round_, steps), self.config.train
        # the bound does not depend on c, to which what is sent is added: each round's would make the next one's larger
        adapter, known = to_tensors(state.adapter), inner.reach
        controls = named({n: adapter[n].new_zeros(adapter[n].shape) for n in inner.tensors})
        return replace(
            inner,
            tensors={**inner.tensors, **controls},
            whole=lambda sent: inner.whole(split(sent)[0]),
            growth=lambda name: CLIPPED * train.max_grad_norm if name.startswith(CONTROL) else inner.growth(name),
            problem=lambda sent: inner.problem(split(sent)[0]),
            reach=(lambda train, rate: known(correcting(train), rate)) if known else None,
        )

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Move c by the mean change of the clients' controls."""
        changes = {u.client: split(u.tensors)[1] for u in updates}
        own = [replace(u, tensors=split(u.tensors)[0]) for u in updates]
        after = self.inner.server_step(own, state, context)
        controls = new_controls(self._controls(state), changes, context.round, self.config.federation.clients)
        controls = bounded(controls, self.config.train)
        return replace(after, memory={**after.memory, self.name: controls})
