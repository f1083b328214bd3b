"""Fed-SB: one r x r matrix R is trained between two frozen orthonormal bases, W0 + s B R A (arXiv 2502.15436).

mean(B R A) = B mean(R) A, so the mean is exact and a client sends r^2 numbers a layer. The bases are the main
singular vectors of the gradient at the start. The first round finds them: clients send random sketches of their
gradient (which are sums, so secure sums apply), the server takes the SVD of the mean from the sketches alone. The
gradient is never built: with B = 0 LoRA's gradient of B is s G A^T, with A = 0 that of A is s B^T G. R starts at 0,
so that the model starts as the base model; the paper starts it near the first step's singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.lora import product
from fedtune.lora.state import AdapterState, fresh, to_tensors
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Gradients, Program, Tensors, Train
from fedtune.methods.sketches import evened
from fedtune.methods.sound import LOOSE
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Sizes, Upload, mean
from fedtune.names import CORE, PREFIX, A, B
from fedtune.types import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

_HOLDERS, _BASIS = "fed_sb/holders", "fed_sb/basis/"
RIGHT, LEFT = 2, 3  # random probes of each side; more on the left, so that the system for the core is overdetermined


class FedSB(Method):
    """Mean of R between fixed bases."""

    name = "fed_sb"
    title = "Fed-SB"
    paper = "arXiv:2502.15436"
    guarantee = "exact"
    updates = "opaque"
    steady = False

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """R both ways, once the bases are there."""
        return sizes.rank**2, sizes.rank**2

    def trainable(self, round_: int, name: str) -> bool:
        """Train R only, which is a part of B in the adapter; A is the common basis."""
        return not name.endswith(A)

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Return the bases and R; before there are any, the fresh adapter."""
        new = {n: t for n, t in {**client.kept, **download}.items() if n != _HOLDERS}
        return new or to_tensors(client.layout)

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Send sketches of the gradient while there are no bases, then train R."""
        if not any(n.endswith(CORE) for n in start):
            return Fitted((yield from self._sketches(client)))
        trained = yield Train(start, [n for n in start if n.endswith(CORE)])
        bases = {n: t for n, t in start.items() if not n.endswith(CORE)}
        return Fitted({n: t for n, t in trained.items() if n.endswith(CORE)}, bases)

    def _probe(self, layout: AdapterState, number: int) -> AdapterState:
        """Return random factors, common to all: A to probe from the right, B from the left."""
        turned = {p: replace(m, a=m.b.T, b=m.a.T) for p, m in layout.items()}
        left = fresh(turned, derive_seed(self.seed, "left probes"), -number)  # a stream of their own
        return {p: replace(m, b=left[p].a.T) for p, m in fresh(layout, self.seed, -number).items()}

    def _sketches(self, client: ClientContext) -> Program[dict[str, Tensor]]:
        """Return G A^T and B^T G for each probe, of the round's first step."""
        sent: dict[str, Tensor] = {}
        for number in range(1, LEFT + 1):
            probe = self._probe(client.layout, number)
            for end, zero in ((B, "b"), (A, "a")):
                if zero == "b" and number > RIGHT:
                    continue
                at = {p: replace(m, **{zero: getattr(m, zero) * 0}) for p, m in probe.items()}
                tensors = to_tensors(at)
                found = yield Gradients(tensors, [n for n in tensors if n.endswith(end)])
                sent |= {f"{n}.{number}": g for n, g in found.items()}
        return sent

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Find the bases in the first round; average R from then on. Without a run, average B under the common A."""
        if not self.in_run:
            return super().server_step(updates, state, context)
        if _HOLDERS not in state.extra:
            even = evened(updates, lambda name: name.rsplit(".lora_", 1)[0])
            return self._founded(mean(even), state, context.round)
        holders = {int(c) for c in state.extra[_HOLDERS]} | {u.client for u in updates}
        extra = {**state.extra, **mean(updates), _HOLDERS: torch.tensor(sorted(holders), dtype=torch.int64)}
        return replace(state, adapter=self._product(state, extra), round=context.round, extra=extra)

    def _founded(self, sketches: Tensors, state: ServerState, round_: int) -> ServerState:
        """Return the state with bases from the SVD of the mean gradient, and R = 0."""
        extra: dict[str, Tensor] = {_HOLDERS: torch.zeros(0, dtype=torch.int64)}
        adapter = {}
        probes = [self._probe(state.adapter, n) for n in range(1, LEFT + 1)]
        for path, module in state.adapter.items():
            right = torch.cat([sketches[f"{PREFIX}{path}{B}.{n}"] for n in range(1, RIGHT + 1)], dim=1)
            left = torch.cat([sketches[f"{PREFIX}{path}{A}.{n}"] for n in range(1, LEFT + 1)], dim=0)
            core = torch.linalg.qr(right)[0]
            probe = torch.cat([p[path].b for p in probes], dim=1)
            # by QR, for LAPACK's own least squares does not give the same bits twice
            basis, triangle = torch.linalg.qr(probe.T @ core)
            inner = _solved(triangle, basis.T @ left)
            u, _, vh = product.svd(product.Product(core, inner))
            bases = product.padded(product.Product(u[:, : module.rank], vh[: module.rank]), module.rank)
            extra[_BASIS + path] = bases.left.contiguous()
            extra[PREFIX + path + CORE] = module.a.new_zeros(module.rank, module.rank)
            adapter[path] = replace(module, a=bases.right.contiguous(), b=torch.zeros_like(module.b))
        return replace(state, adapter=adapter, round=round_, extra=extra)

    def _product(self, state: ServerState, extra: Tensors) -> AdapterState:
        """Return the model as a LoRA adapter: (A, B R)."""
        return {p: replace(m, b=extra[_BASIS + p] @ extra[PREFIX + p + CORE]) for p, m in state.adapter.items()}

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send R, and the bases to whoever does not have them; nothing but a mark before there are any."""
        known = state.extra.get(_HOLDERS)
        if known is None:
            return {_HOLDERS: torch.tensor(0)}
        sent = {n: t for n, t in state.extra.items() if n.endswith(CORE)}
        if client not in known.tolist():
            sent |= {PREFIX + p + A: m.a for p, m in state.adapter.items()}
            sent |= {PREFIX + p + B: state.extra[_BASIS + p] for p in state.adapter}
        return sent

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Expect sketches in the first round, of any plausible size, for only their directions are used; then R."""
        known = super().upload(state, client, round_, steps)
        if _HOLDERS in state.extra:
            return replace(known, tensors={n: t for n, t in state.extra.items() if n.endswith(CORE)})
        probes = [(n, t, i) for n, t in to_tensors(state.adapter).items() for i in range(1, LEFT + 1)]
        sketches = {f"{n}.{i}": t for n, t, i in probes if n.endswith(A) or i <= RIGHT}
        most = max(steps, LEFT + RIGHT)  # a loss for each sketch
        return replace(known, tensors=sketches, losses=most, growth=lambda name: LOOSE, once=True)


def _solved(triangle: Tensor, right: Tensor) -> Tensor:
    """Return X with triangle X = right; the one of least norm where sketches hold too few directions for one X."""
    diagonal = triangle.diagonal().abs()
    regular = bool(diagonal.min() > torch.finfo(triangle.dtype).eps * diagonal.max())
    found: Tensor = (
        torch.linalg.solve_triangular(triangle, right, upper=True) if regular else torch.linalg.pinv(triangle) @ right
    )
    return found
