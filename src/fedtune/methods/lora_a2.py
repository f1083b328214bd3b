"""LoRA-A2: alternating factors, and of those only the ranks that matter to a client (arXiv 2410.22815).

Odd rounds train B, even rounds A, with the other factor common. A client first trains all ranks, scores rank j of a
layer by ||dB[:, j]|| ||A[j]|| (the norm of what it changed), keeps the best of all layers within its budget and
trains those again from the start. Only they are sent. What a client does not send counts as unchanged, so the mean is
exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors, Train
from fedtune.methods.state import ClientUpdate, ServerState, Sizes
from fedtune.names import CHOSEN, A, B

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState


def _axis(name: str) -> int:
    """Return which axis of a factor counts ranks."""
    return 0 if name.endswith(A) else 1


class LoRAA2(Method):
    """Alternating mean of chosen ranks."""

    name = "lora_a2"
    title = "LoRA-A2"
    paper = "arXiv:2410.22815"
    exact = True
    mixed_ranks = True
    ragged = True
    pairs = False
    factors = False

    class Parameters(Method.Parameters):
        """`share`: of all ranks a client may train where `lora.ranks` gives it no budget of its own."""

        share: float = Field(0.5, gt=0, le=1)

    parameters: Parameters

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """The default share of one factor up, on average; both factors down."""
        whole = sizes.a + sizes.b
        return whole / 4, whole

    def trainable(self, round_: int, name: str) -> bool:
        """Train B in odd rounds and A in even ones."""
        return name.endswith(B) if round_ % 2 else name.endswith(A)

    def cut(self, adapter: AdapterState, client: int) -> AdapterState:
        """Leave the adapter whole: a client's rank is its budget."""
        return adapter

    def budget(self, adapter: AdapterState, client: int) -> int:
        """Return how many ranks a client may train, over all layers."""
        own = self.rank_of(client)
        ranks = sum(m.rank for m in adapter.values())
        share = self.parameters.share
        return own * len(adapter) if own else max(1, int(share * ranks))

    def losses(self, steps: int) -> int:
        """Count both trainings: of all ranks, and of those chosen."""
        return 2 * steps

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Score all ranks, train the best again, and send those."""
        names = [n for n in start if self.trainable(client.round, n)]
        chosen = self.choose((yield Train(start, names)), start, names, self.budget(client.layout, client.client))
        trained = yield Train(start, names, masks=_masks(start, chosen))
        sent = {n: trained[n].index_select(_axis(n), chosen[n]) for n in names}
        return Fitted({**sent, **{n + CHOSEN: chosen[n] for n in names}})

    def choose(self, trained: Tensors, start: Tensors, names: Sequence[str], budget: int) -> dict[str, Tensor]:
        """Return for each trained tensor the ranks with the largest changes, ascending."""
        import torch

        scores = []
        for name in names:
            other = start[name.replace(A, B) if name.endswith(A) else name.replace(B, A)]
            change = (trained[name] - start[name]).norm(dim=1 - _axis(name))
            scores.append(change * other.norm(dim=_axis(name)))
        order = torch.cat(scores).argsort(descending=True, stable=True)[:budget].sort().values
        chosen, offset = {}, 0
        for name, score in zip(names, scores, strict=True):
            inside = order[(order >= offset) & (order < offset + len(score))] - offset
            chosen[name], offset = inside, offset + len(score)
        return chosen

    def expected(self, state: ServerState, client: int, round_: int) -> dict[str, Tensor]:
        """Expect at most the whole factors, with the ranks chosen."""
        import torch

        whole = super().expected(state, client, round_)
        return {**whole, **{n + CHOSEN: torch.arange(t.shape[_axis(n)]) for n, t in whole.items()}}

    def flaw(self, update: Tensors, state: ServerState, client: int, round_: int, steps: int) -> str:
        """Refuse ranks that do not exist, come twice, or exceed the budget."""
        total = 0
        for name, whole in super().expected(state, client, round_).items():
            axis, ranks, got = _axis(name), update[name + CHOSEN], update[name]
            if ranks.dim() != 1 or ranks.numel() > whole.shape[axis]:
                return f"{name}: {tuple(ranks.shape)} ranks of {whole.shape[axis]}"
            total += ranks.numel()
            if got.dim() != 2 or got.shape[1 - axis] != whole.shape[1 - axis] or got.shape[axis] != ranks.numel():
                return f"{name}: got {tuple(got.shape)} for {ranks.numel()} ranks of {tuple(whole.shape)}"
            if not all(0 <= r < whole.shape[axis] for r in ranks.tolist()):
                return f"{name}: ranks outside 0 to {whole.shape[axis] - 1}"
            if len(set(ranks.tolist())) != ranks.numel():
                return f"{name}: a rank comes twice"
        limit = self.budget(state.adapter, client)
        return f"{total} ranks, the budget is {limit}" if total > limit else ""

    def completed(self, update: ClientUpdate, state: ServerState) -> AdapterState:
        """Return an update as a whole adapter: ranks that were not sent are unchanged."""
        from fedtune.lora.state import to_tensors, with_tensors

        tensors = to_tensors(state.adapter)
        for name in [n for n in update.tensors if not n.endswith(CHOSEN)]:
            whole = tensors[name].clone()
            tensors[name] = whole.index_copy_(_axis(name), update.tensors[name + CHOSEN], update.tensors[name])
        return with_tensors(state.adapter, tensors)

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Average the trained factor."""
        from fedtune.lora.state import to_tensors

        whole = [
            replace(
                u, tensors={n: t for n, t in to_tensors(self.completed(u, state)).items() if self.trainable(round_, n)}
            )
            for u in updates
        ]
        return super().server_step(whole, state, round_)

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Average whole factors, as if every client had chosen every rank."""
        from fedtune.methods.rolora import RoLoRA

        return RoLoRA(RoLoRA.Parameters()).aggregate(clients, examples, state, round_)


def _masks(start: Tensors, chosen: Tensors) -> dict[str, Tensor]:
    masks = {}
    for name, ranks in chosen.items():
        mask = start[name].new_zeros(start[name].shape)
        masks[name] = mask.index_fill_(_axis(name), ranks, 1.0)
    return masks
