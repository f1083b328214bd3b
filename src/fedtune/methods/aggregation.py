"""Whole adapters that anybody made, aggregated without a run: as clients would send them, in one round of a method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedtune.lora.algebra import weighted_mean
from fedtune.lora.state import AdapterState, LoraModule, Plain, resized, to_tensors, with_tensors
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Tensors
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState
from fedtune.names import beside


def _like(method: Method, clients: Sequence[AdapterState], state: ServerState, rank: int) -> AdapterState:
    """Return the adapter that the server has: zeros in the shape of the largest client's where ranks differ."""
    if not method.mixed_ranks:
        return state.adapter
    largest = {path: max((c[path] for c in clients), key=lambda m: m.rank) for path in clients[0]}
    ranks = {m.rank for c in (*clients, state.adapter) for m in c.values()}
    if ranks <= {rank or next(iter(ranks))}:
        return state.adapter
    return {path: resized(module, rank or module.rank) for path, module in largest.items()}


def _with_alpha(module: LoraModule, like: LoraModule) -> LoraModule:
    new = replace(module, alpha=like.alpha, rslora=like.rslora)
    return new if new.scale == module.scale else replace(new, b=module.b * (module.scale / new.scale))


def _fitting(client: AdapterState, like: AdapterState) -> AdapterState:
    """Return a client's deltas with another adapter's alpha; B takes up the difference of the scales."""
    return client if isinstance(client, Plain) else {path: _with_alpha(m, like[path]) for path, m in client.items()}


def aggregate(
    method: Method, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, rank: int = 0
) -> tuple[ServerState, Iterator[AdapterState] | None]:
    """Make one round with adapters in the place of what clients trained.

    Args:
        method: whose server half it is.
        clients: their adapters; read one at a time where the method is linear.
        examples: of each.
        state: the server's before it: the adapter they started from, and the round before.
        rank: of the result, where the method can cut it; 0 is the largest of the clients'.

    Returns:
        The state after it, and what each client gets of it where that is not one global adapter.
    """
    alone = type(method)(method.parameters, replace(method.run, rank=0, ranks={}))
    round_, adapter = state.round + 1, _like(method, clients, state, rank)
    before, start = replace(state, adapter=adapter), to_tensors(adapter)

    def sent(client: AdapterState) -> Tensors:
        return alone.payload(to_tensors(_fitting(client, adapter)), start, round_)

    if method.linear:
        updates = [ClientUpdate(0, weighted_mean(map(sent, clients), examples), 1.0)]
    else:
        updates = [ClientUpdate(i, sent(c), n) for i, (c, n) in enumerate(zip(clients, examples, strict=True))]
    after = alone.server_step(updates, before, RoundContext(round_))
    if method.models != "own":
        return after, None
    # what is trained and not sent is nobody's: the server has none of it
    nobody = {n: t * 0 for n, t in start.items() if alone.trainable(round_, n) and n not in updates[0].tensors}
    after = replace(after, adapter=with_tensors(after.adapter, {**to_tensors(after.adapter), **nobody}))
    return after, (_own(alone, c, after, i) for i, c in enumerate(clients))


def _own(method: Method, client: AdapterState, after: ServerState, number: int) -> AdapterState:
    """Return what a client starts the next round from: its own adapter, or that beside which it is trained."""
    layout = _fitting(client, after.adapter)
    context = ClientContext(number, after.round + 1, 1, layout, kept={}, rate=0.0, steps=0)
    begun = method.begin(context, method.view(after, number))
    return with_tensors(layout, {n: begun.get(beside(n), begun[n]) for n in to_tensors(layout)})
