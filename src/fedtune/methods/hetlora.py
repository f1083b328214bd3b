"""HetLoRA: truncated adapters, zero-padded and weighted by the norm of their product; clients prune (arXiv 2401.06432).

Client i's weight in a layer is its examples times ||B_i A_i||_F, of which no more than twice the round's median counts:
the norm is what a client says it is. Its loss has lambda ||B[:, c:]|| ||A[c:]|| with c =
gamma r_i; if that tail has shrunk at the end of the round, the client cuts its rank to c and keeps it so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.lazy import torch
from fedtune.lora.product import size
from fedtune.lora.state import LoraModule, to_tensors, with_rank, with_tensors
from fedtune.methods.rbla import RBLA
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors, Train
from fedtune.methods.sound import capped
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Upload
from fedtune.names import A, B

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config

_RANKS = "hetlora/ranks"


class HetLoRA(RBLA):
    """Zero-padding with norm weights and self-pruning."""

    name = "hetlora"
    title = "HetLoRA"
    paper = "arXiv:2401.06432"
    steady = False

    class Parameters(RBLA.Parameters):
        """`regulariser`: lambda of the tail's penalty; `gamma`: the share of its rank a client keeps when it prunes."""

        regulariser: float = Field(0.005, ge=0)
        gamma: float = Field(0.99, gt=0, le=1)

        def inert(self) -> str:
            """Without pruning there is no tail to penalise."""
            changed = self.gamma == 1 and self.regulariser != type(self)().regulariser
            return "with gamma = 1 nothing is pruned, and regulariser does nothing" if changed else ""

        def idle(self, config: Config) -> Iterator[tuple[str, str]]:
            """Name the settings of a tail that no client has."""
            if max(config.lora.ranks or (config.lora.r,)) == 1:
                yield from (
                    (f"method.{k}", "a client of rank 1 has nothing to prune") for k in ("regulariser", "gamma")
                )

    parameters: Parameters

    def _tail(self, tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
        """Return for each layer the part beyond gamma r of (A, B); layers without one are left out."""
        tails = {}
        for name in tensors:
            if name.endswith(A):
                a, b = tensors[name], tensors[name.replace(A, B)]
                cut = self.pruned(a.shape[0])
                if cut < a.shape[0]:
                    tails[name.removesuffix(A)] = (a[cut:], b[:, cut:])
        return tails

    def penalty(self, now: Tensors) -> Tensor | None:
        """Return lambda times the sum over layers of ||B_tail|| ||A_tail||; None where there is no tail."""
        weight = self.parameters.regulariser
        # the norm of an exact zero has no gradient: the smallest square keeps it finite
        parts = [
            (b.square().sum() + 1e-12).sqrt() * (a.square().sum() + 1e-12).sqrt() for a, b in self._tail(now).values()
        ]
        return weight * sum(parts[1:], parts[0]) if parts and weight else None

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train, and cut the rank where the tail shrank over the round; B takes up what alpha/r changes."""
        trained = yield Train(start, list(start), self.penalty)
        before, after = (sum(float(a.norm() * b.norm()) for a, b in self._tail(t).values()) for t in (start, trained))
        if not 0 < after < before:
            return Fitted(dict(trained))
        adapter = with_tensors(client.layout, trained)
        return Fitted(to_tensors({path: with_rank(m, self.pruned(m.rank)) for path, m in adapter.items()}))

    def pruned(self, rank: int) -> int:
        """Return the rank a client of a rank prunes itself to."""
        return max(1, math.floor(self.parameters.gamma * rank))

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send the first ranks of the global adapter: the client's own, or those it pruned itself to."""
        known = {int(c): int(r) for c, r in state.extra.get(_RANKS, ())}
        rank = known.get(client, self.run.ranks.get(client))
        return to_tensors({p: m if rank is None else with_rank(m, rank) for p, m in state.adapter.items()})

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Expect the rank that was sent or the pruned one, the same in every layer."""
        allowed = self.view(state, client)
        whole = next(t.shape[0] for n, t in allowed.items() if n.endswith(A))

        def problem(sent: Tensors) -> str:
            for name, tensor in sent.items():
                wide = 1 if name.endswith(A) else 0
                if tensor.dim() != 2 or tensor.shape[wide] != allowed[name].shape[wide]:
                    return f"{name}: got {tuple(tensor.shape)}, expected {tuple(allowed[name].shape)} or a pruned rank"
            got = {t.shape[0 if n.endswith(A) else 1] for n, t in sent.items()}
            if len(got) != 1 or not got <= {whole, self.pruned(whole)}:
                return f"ranks {sorted(got)}, expected {whole} or, pruned, {self.pruned(whole)}"
            return ""

        known = super().upload(state, client, round_, steps)
        return replace(known, tensors=allowed, problem=problem, ragged=True)

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Aggregate, and remember the ranks clients have pruned themselves to."""
        after = super().server_step(updates, state, context)
        ranks = {int(c): int(r) for c, r in state.extra.get(_RANKS, ())}
        for update in updates:
            ranks[update.client] = next(t.shape[0] for n, t in update.tensors.items() if n.endswith(A))
        table = torch.tensor(sorted(ranks.items()), dtype=torch.int64)
        return replace(after, extra={**after.extra, _RANKS: table})

    def shares(self, clients: Sequence[LoraModule], weights: Sequence[float], rank: int) -> Tensor:
        """Return the same weight for every rank: missing ranks count as zeros."""
        norms = capped([size(m) for m in clients])
        known = [w * norm for w, norm in zip(weights, norms, strict=True)]
        used = known if sum(known) > 0 else list(weights)
        return torch.tensor(used, dtype=torch.float64)[:, None].expand(-1, rank)
