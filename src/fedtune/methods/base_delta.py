"""What methods share that move the base model: each round's change is a low-rank side adapter, downloaded once.

A client keeps the side adapters it has; the server remembers until which round that is and sends only what came
later, or everything after a compression. Nothing is ever folded into the base model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from fedtune.config.schema import Section
from fedtune.methods.base import ClientUpdate, Method, ServerState
from fedtune.methods.local import Fitted, Local, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.product import Product
    from fedtune.lora.state import AdapterState

_SEEN, _SINCE = "base/seen", "base/since"
_SIDES = (".base_A.weight", ".base_B.weight")


def is_side(name: str) -> bool:
    """Tell whether a tensor is part of a side adapter."""
    return name.endswith(_SIDES)


class MovesBase(Method):
    """A method whose server step appends to the base model."""

    linear = False
    keeps_base = True
    stateful = True
    private = True
    factors: ClassVar[bool] = False

    class Parameters(Section):
        """`base_rank`: most columns of a layer's side adapters before they are compressed; 0 loses nothing."""

        base_rank: int = Field(0, ge=0)

    @property
    def base_rank(self) -> int:
        """The cap of a layer's side adapters."""
        return cast("MovesBase.Parameters", self.parameters).base_rank

    def trainable(self, round_: int, name: str) -> bool:
        """Side adapters are frozen."""
        return not is_side(name)

    def begin(self, layout: AdapterState, download: Tensors, kept: Tensors, round_: int) -> dict[str, Tensor]:
        """Put the side adapters that are new to the client beside those it has."""
        from fedtune.lora import base_delta, product

        new = dict(download)
        whole = int(new.pop(_SINCE)) == 0
        own = {n: new.pop(n) for n in list(new) if is_side(n)}
        pieces = [base_delta.from_side_tensors(t) for t in ([] if whole else [kept]) + [own]]
        paths = dict.fromkeys(path for p in pieces for path in p)
        joined = {path: product.total(*(p[path] for p in pieces if path in p)) for path in paths}
        return {**super().begin(layout, new, {}, round_), **base_delta.side_tensors(joined)}

    def fit(self, local: Local, start: Tensors) -> Fitted:
        """Train the adapter beside the frozen side adapters, and keep those."""
        fitted = super().fit(local, start)
        return Fitted(fitted.payload, {**fitted.kept, **{n: t for n, t in start.items() if is_side(n)}})

    def _seen(self, state: ServerState) -> dict[int, int]:
        table = state.extra.get(_SEEN)
        return {} if table is None else {int(client): int(round_) for client, round_ in table}

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send the adapter, and the side adapters this client has not had yet."""
        import torch

        from fedtune.lora import base_delta

        seen = self._seen(state).get(client, 0)
        # a piece older than what the client has seen is still there, so nothing was compressed since
        since = seen if state.base and state.base[0].round <= seen else 0
        new = base_delta.join([p for p in state.base if p.round > since])
        sides = base_delta.side_tensors(new)
        return {**self.shared(state, client), **sides, _SINCE: torch.tensor(since)}

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
        import torch

        from fedtune.lora.base_delta import append

        base = append(state.base, round_, products, self.base_rank)
        seen = self._seen(state) | {u.client: state.round for u in updates if u.client >= 0}
        table = torch.tensor(sorted(seen.items()), dtype=torch.int64).reshape(-1, 2)
        return replace(state, adapter=adapter, round=round_, base=base, extra={**state.extra, _SEEN: table})
