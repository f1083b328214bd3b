"""FedASK: the mean product from two sums, so that secure sums apply to it (arXiv 2507.09990).

First exchange: Y = sum_i w_i s_i B_i (A_i Omega) with a common random Omega of `width` columns; the server takes a
basis Q of Y's directions. Second: P = sum_i w_i (Q^T s_i B_i) A_i, and Q P = Q Q^T M. Exact once the width reaches M's
rank; below that it is a randomised SVD. Its best rank-r part is the next adapter (in the paper's balanced split); the
rest goes into the base or is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedtune.lazy import torch
from fedtune.lora import product
from fedtune.lora.state import AdapterState, LoraModule, with_tensors
from fedtune.methods.hlora import HLoRA
from fedtune.methods.moves_base import MovesBase, is_kept
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors
from fedtune.methods.sketches import directions, evened
from fedtune.methods.sound import GROWTH, LOOSE
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Sizes, Upload, mean
from fedtune.types import UpdateError, derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config

_Q, _Y, _P, _OWN = "fedask/Q/", "fedask/Y/", "fedask/P/", "fedask/own/"


class FedASK(MovesBase):
    """Two-phase sketch of the mean product."""

    name = "fedask"
    title = "FedASK"
    paper = "arXiv:2507.09990"
    guarantee = "exact"
    mixed_ranks = True
    updates = "opaque"

    class Parameters(MovesBase.Parameters):
        """`width`: columns of the sketch, 0 for as many as make it exact; `rest`: keep or drop what exceeds rank r."""

        width: int = Field(0, ge=0)
        rest: Literal["keep", "drop"] = "keep"

        def idle(self, config: Config) -> Iterator[tuple[str, str]]:
            """Name a width that the default has as well."""
            yield from super().idle(config)
            most = config.federation.cohort_size * config.lora.r
            if self.width >= most:
                why = "the mean of a round, which the default is wide enough for, has a rank of at most"
                yield "method.width", f"{why} {most}"

    parameters: Parameters

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """Both sketches up, at the exact width N r; Q, the adapter and the rest down."""
        return sizes.clients * (sizes.a + sizes.b), sizes.clients * (sizes.a + 2 * sizes.b)

    def sketch_width(self, out: int, inner: int, rank: int) -> int:
        """Return the columns of a layer's sketch: no more than the ranks of a cohort add up to."""
        return self._columns(out, inner, self.run.cohort * rank)

    def _columns(self, out: int, inner: int, ranks: int) -> int:
        return min(out, inner, ranks, self.parameters.width or ranks)

    def probe(self, path: str, inner: int, width: int, round_: int) -> Tensor:
        """Return Omega [in, width]: the same everywhere; fewer columns are the first of more."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "omega", round_, path))
        return torch.randn(width, inner, generator=generator, dtype=torch.float64).T

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train and send the first sketch; in the second exchange send the second."""
        if client.phase == 2:
            own = {n.removeprefix(_OWN): t for n, t in client.kept.items() if n.startswith(_OWN)}
            kept = {n: t for n, t in client.kept.items() if is_kept(n)}
            bases = {n.removeprefix(_Q): t for n, t in start.items()}
            return Fitted(self.second(with_tensors(client.layout, own), bases), kept)
        fitted = yield from super().fit(client, start)
        adapter = with_tensors(client.layout, fitted.payload)
        own = {_OWN + n: t for n, t in fitted.payload.items()}
        return Fitted(self.first(adapter, self._widths(adapter), client.round), {**fitted.kept, **own})

    def _widths(self, adapter: AdapterState) -> dict[str, int]:
        """Return each layer's sketch width, which must not depend on the client's own rank."""
        rank = self.run.rank
        return {p: self.sketch_width(m.b.shape[0], m.a.shape[1], rank or m.rank) for p, m in adapter.items()}

    def first(self, adapter: AdapterState, widths: dict[str, int], round_: int) -> dict[str, Tensor]:
        """Return s B (A Omega) of each layer [out, width]."""
        sent = {}
        for path, m in adapter.items():
            whole = product.of(m)
            omega = self.probe(path, m.a.shape[1], widths[path], round_).to(whole.right.dtype)
            sent[_Y + path] = whole.left @ (whole.right @ omega)
        return sent

    def second(self, adapter: AdapterState, bases: Tensors) -> dict[str, Tensor]:
        """Return (Q^T s B) A of each layer [width, in]."""
        products = {path: product.of(module) for path, module in adapter.items()}
        return {_P + p: (bases[p].to(w.left.dtype).T @ w.left) @ w.right for p, w in products.items()}

    def _with_bases(self, updates: Sequence[ClientUpdate], state: ServerState) -> ServerState:
        """Return the state with an orthonormal basis of the summed first sketches.

        At a width with room for everybody that is a basis of all clients' own directions, which span the sum whatever
        the sizes: added up, one large sketch would take the digits of the others.

        Raises:
            UpdateError: a client's sketch has more directions than its rank, and would leave none to the others.
        """
        own: dict[str, list[Tensor]] = {name: [] for name in updates[0].tensors}
        for update in updates:
            for name, sketch in update.tensors.items():
                rank = self.run.ranks.get(update.client) or state.adapter[name.removeprefix(_Y)].rank
                found, more = directions(sketch, rank)
                if more:
                    raise UpdateError(update.client, f"{name} has more directions than its rank of {rank}")
                own[name].append(found)
        bases = {}
        for name, sketch in mean(evened(updates, lambda name: name)).items():
            path = name.removeprefix(_Y)
            every = torch.cat(own[name], dim=1)
            spanned = every if self._has_room(state.adapter[path], sketch.shape[1], every.shape[1]) else sketch
            bases[_Q + path] = torch.linalg.qr(spanned)[0].to(sketch.dtype)
        return replace(state, extra={**state.extra, **bases})

    def _has_room(self, module: LoraModule, width: int, directions: int) -> bool:
        """Tell whether sketches of a width tell a round's directions apart; by default they are as wide as that."""
        return not self.parameters.width or width >= min(module.b.shape[0], module.a.shape[1], directions)

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Find the bases from the first sketches; split Q P of the second into the next adapter and the rest."""
        if not self.in_run:
            updates, state = self._sketched(updates, state, context.round)
        elif not any(name.startswith(_Q) for name in state.extra):
            return self._with_bases(updates, state)
        averaged, adapter, rest = mean(updates), {}, {}
        for path, module in state.adapter.items():
            whole = product.Product(state.extra[_Q + path], averaged[_P + path])
            best, rest[path] = product.split(whole, module.rank)
            adapter[path] = HLoRA(HLoRA.Parameters()).factors_of(module, best)
        kept = {n: t for n, t in state.extra.items() if not n.startswith(_Q)}
        moved = rest if self.parameters.rest == "keep" else {}
        return self.moved(replace(state, extra=kept), adapter, moved, updates, context.round)

    def _sketched(
        self, updates: Sequence[ClientUpdate], state: ServerState, round_: int
    ) -> tuple[list[ClientUpdate], ServerState]:
        """Return the second sketches of whole adapters, of any ranks, and the state with the bases of the first."""
        clients = self.adapters(updates, state, round_)
        total = {p: sum(c[p].rank for c in clients) for p in state.adapter}
        widths = {p: self._columns(m.b.shape[0], m.a.shape[1], total[p]) for p, m in state.adapter.items()}
        first = [replace(u, tensors=self.first(c, widths, round_)) for u, c in zip(updates, clients, strict=True)]
        after = self._with_bases(first, state)
        bases = {n.removeprefix(_Q): t for n, t in after.extra.items()}
        return [replace(u, tensors=self.second(c, bases)) for u, c in zip(first, clients, strict=True)], after

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send the model, or in the second exchange the bases."""
        bases = {n: t for n, t in state.extra.items() if n.startswith(_Q)}
        return bases or super().view(state, client)

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Expect the first sketches, of any plausible size, for only their directions are used; then the second."""
        first = not any(name.startswith(_Q) for name in state.extra)
        growth = LOOSE if first else GROWTH**2  # the second are products
        tensors = {}
        for path, m in state.adapter.items():
            # as large as one of the global adapter can be, so that the screening allows for it
            norm, (out, inner) = product.size(m), (m.b.shape[0], m.a.shape[1])
            if first:
                width = self.sketch_width(out, inner, self.run.rank or m.rank)
                tensors[_Y + path] = _even(m, (out, width), norm * (width * inner) ** 0.5)
            else:
                tensors[_P + path] = _even(m, (state.extra[_Q + path].shape[1], inner), norm)
        return replace(super().upload(state, client, round_, steps), tensors=tensors, growth=lambda name: growth)


def _even(like: LoraModule, shape: tuple[int, int], norm: float) -> Tensor:
    """Return a tensor of equal numbers with a Frobenius norm."""
    return like.a.new_full(shape, norm / (shape[0] * shape[1]) ** 0.5)
