"""What methods share that move the base model: each round's change is a low-rank side adapter, downloaded once.

A client keeps the side adapters it has, and how many columns it had in each of its rounds. The server remembers the
last round of which it has a client's answer and sends what came later, or everything after a compression; what a client
got in a round whose answer was lost it leaves out again. Nothing is ever folded into the base model's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.lazy import torch
from fedtune.lora import base_delta, product
from fedtune.lora.product import Product
from fedtune.lora.state import AdapterState
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors
from fedtune.methods.state import ClientUpdate, ServerState
from fedtune.names import BASE

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config

_SEEN, _SINCE, _HELD = "base/seen", "base/since", "base/held"


def is_base_side(name: str) -> bool:
    """Tell whether a tensor is part of a change of the base model."""
    return name.endswith(BASE)


def is_kept(name: str) -> bool:
    """Tell whether a tensor is what a client keeps of its side adapters."""
    return is_base_side(name) or name == _HELD


class MovesBase(Method):
    """A method whose server step appends to the base model."""

    steady = False

    class Parameters(Method.Parameters):
        """`base_rank`: most columns of a layer's side adapters before they are compressed.

        0 is the layer's full rank, which loses nothing.
        """

        base_rank: int = Field(0, ge=0)

        def idle(self, config: Config) -> Iterator[tuple[str, str]]:
            """Name a limit that no run of so many rounds reaches.

            The unchanged model may stand beside a round's clients, where their changes are clipped.
            """
            rounds = config.federation.rounds
            most = rounds * (config.federation.cohort_size + 1) * config.lora.r
            if self.base_rank >= most:
                yield "method.base_rank", f"in {rounds} rounds a layer's side adapters have at most {most} columns"

    parameters: Parameters

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Put the side adapters that are new to the client beside those it has."""
        new = dict(download)
        since = int(new.pop(_SINCE))
        own = base_delta.from_side_tensors({n: new.pop(n) for n in list(new) if is_base_side(n)})
        pieces = [self._held(client.kept, since, sorted(client.layout)), own] if since else [own]
        paths = dict.fromkeys(path for p in pieces for path in p)
        joined = {path: product.total(*(p[path] for p in pieces if path in p)) for path in paths}
        return {**super().begin(client, new), **base_delta.side_tensors(joined)}

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train the adapter beside the frozen side adapters, and keep those."""
        fitted = yield from super().fit(client, start)
        columns = {path: p.inner for path, p in base_delta.from_side_tensors(start).items()}
        row = torch.tensor([[client.round, *(columns.get(path, 0) for path in sorted(client.layout))]])
        held = torch.cat([client.kept[_HELD], row]) if _HELD in client.kept else row
        sides = {n: t for n, t in start.items() if is_base_side(n)}
        return Fitted(fitted.payload, {**fitted.kept, **sides, _HELD: held})

    def _held(self, kept: Tensors, round_: int, paths: Sequence[str]) -> dict[str, Product]:
        """Return the side adapters a client had in one of its rounds: the first columns of what it has."""
        row = next(row.tolist() for row in kept[_HELD].flip(0) if int(row[0]) == round_)
        have = base_delta.from_side_tensors(kept)
        columns = zip(paths, row[1:], strict=True)
        return {p: Product(have[p].left[:, :n], have[p].right[:n]) for p, n in columns if n}

    def _seen(self, state: ServerState) -> dict[int, tuple[int, int]]:
        """Return for each client the last round it answered, and the state's round then."""
        return {int(client): (int(last), int(then)) for client, last, then in state.extra.get(_SEEN, ())}

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send the adapter, and the side adapters this client has not had yet."""
        last, then = self._seen(state).get(client, (0, 0))
        # a piece older than what the client has seen is still there, so nothing was compressed since
        known = bool(state.base) and state.base[0].round <= then
        new = base_delta.join([p for p in state.base if p.round > (then if known else 0)])
        sides = base_delta.side_tensors(new)
        return {**self.shared(state, client), **sides, _SINCE: torch.tensor(last if known else 0)}

    def shared(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return the part of the adapter that is downloaded beside the side adapters."""
        return super().view(state, client)

    def moved(
        self,
        state: ServerState,
        adapter: AdapterState,
        products: Mapping[str, Product],
        updates: Sequence[ClientUpdate],
        round_: int,
    ) -> ServerState:
        """Return the state with a new adapter and a change of the base model."""
        base = base_delta.append(state.base, round_, products, self.parameters.base_rank)
        seen = self._seen(state) | {u.client: (round_, state.round) for u in updates if u.client >= 0}
        table = torch.tensor([(c, *seen[c]) for c in sorted(seen)], dtype=torch.int64).reshape(-1, 3)
        return replace(state, adapter=adapter, round=round_, base=base, extra={**state.extra, _SEEN: table})
