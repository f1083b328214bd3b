"""FedALT: each client's own adapter, and beside it, frozen, the mean of the others' (arXiv 2503.11880).

A router, softmax over the two, weighs them for each token; it and the adapter are trained, and the router never
leaves the client. The rest of the world needs no second server pass: with the mean over all and its own share w_i a
client computes (mean - w_i own) / (1 - w_i) itself, so secure sums apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.lora.product import size
from fedtune.lora.state import AdapterState, to_tensors
from fedtune.methods.base import Method
from fedtune.methods.kept import as_of, with_previous
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors, Train
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Upload, weights
from fedtune.names import FACTORS, OTHER, PREFIX, ROUTER, beside

if TYPE_CHECKING:
    from torch import Tensor

_SHARE, _SHARES, _ROUND = "fedalt/share", "fedalt/shares", "fedalt/round"
# by client: the round of its last update, and of each layer the norms of A, B and their product
_SIZES = "fedalt/sizes/"
_ENDS = tuple(enumerate(FACTORS))
# of what a client keeps beside its newest adapter and router
_PREFIX = "fedalt/"


def rest_of_world(mean: Tensor, own: Tensor, share: float) -> Tensor:
    """Return the mean of the others: (mean - w own) / (1 - w); zeros where there are none."""
    rest = (mean.double() - share * own.double()) / (1 - share) if share < 1 else mean * 0
    return rest.to(mean.dtype)


def _sizes(adapter: AdapterState, round_: int) -> Tensor:
    """Return a round, then the norms of A, B and their product of each layer in order: float64 [1 + 3 layers]."""
    layers = [(float(m.a.norm()), float(m.b.norm()), size(m)) for _, m in sorted(adapter.items())]
    return torch.tensor([float(round_), *chain.from_iterable(layers)], dtype=torch.float64)


class FedALT(Method):
    """Own adapter, rest-of-world adapter, router."""

    name = "fedalt"
    title = "FedALT"
    paper = "arXiv:2503.11880"
    models = "own"
    steady = False

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Return the own adapter and router as kept, and the rest of the world from the mean."""
        share = float(download[_SHARE])
        own = {**to_tensors(client.layout), **as_of(client.kept, int(download[_ROUND]), _PREFIX)}
        for name, mean in download.items():
            if name.endswith(FACTORS):
                own[beside(name)] = rest_of_world(mean, own[name], share) if share else mean
        for path, module in client.layout.items():
            own.setdefault(PREFIX + path + ROUTER, module.a.new_zeros(2, module.a.shape[1]))
        return own

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train; keep the adapter and the router, send the adapter."""
        names = [n for n in start if not n.endswith(OTHER)]
        trained = yield Train(start, names)
        own = {n: trained[n] for n in names}
        # what was trained in a round of which the server did not hear is in no mean, and nothing can be counted from it
        kept = with_previous(own, {n: start[n] for n in names}, client.round, _PREFIX)
        return Fitted({n: t for n, t in own.items() if n.endswith(FACTORS)}, kept)

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Average the adapters, and remember what share of the mean each client has."""
        after, shares = super().server_step(updates, state, context), weights(updates)
        table = [[float(u.client), w / sum(shares)] for u, w in zip(updates, shares, strict=True)]
        whole = self.adapters(updates, state, context.round)
        sizes = {f"{_SIZES}{u.client}": _sizes(a, context.round) for u, a in zip(updates, whole, strict=True)}
        return replace(after, extra={**after.extra, **sizes, _SHARES: torch.tensor(table, dtype=torch.float64)})

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Count bounds from a client's own adapter, which it goes back to where a reply of it was not heard."""
        known, paths = super().upload(state, client, round_, steps), sorted(state.adapter)
        now = _sizes(state.adapter, round_)
        own = state.extra.get(f"{_SIZES}{client}", now)
        more = (own - now)[1:].tolist()
        factors = {f"{PREFIX}{path}{end}": more[3 * i + j] for i, path in enumerate(paths) for j, end in _ENDS}
        products = dict(zip(paths, more[2::3], strict=True))
        return replace(
            known,
            growth=lambda name: known.growth(name) + factors.get(name, 0.0),
            product=lambda path: known.product(path) + products[path],
        )

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send the mean, this client's share in it, and the round in which the client was last heard."""
        shares = {int(c): s for c, s in state.extra.get(_SHARES, torch.zeros(0, 2)).tolist()}
        share = torch.tensor(shares.get(client, 0.0), dtype=torch.float64)
        last = state.extra.get(f"{_SIZES}{client}", torch.zeros(1))[0]
        return {**super().view(state, client), _SHARE: share, _ROUND: last.long()}
