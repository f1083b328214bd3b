"""LoRA-A2: alternating factors, and of those only the ranks that matter to a client (arXiv 2410.22815).

Odd rounds train B, even rounds A, with the other factor common. A client first trains all ranks, scores rank j of a
layer by ||dB[:, j]|| ||A[j]|| (the norm of what it changed), keeps the best of all layers within its budget and
trains those again from the start. Only they are sent. What a client does not send counts as unchanged, so the mean is
exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.lazy import torch
from fedtune.lora.state import AdapterState, to_tensors
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors, Train
from fedtune.methods.state import ClientUpdate, RoundContext, RunContext, ServerState, Sizes, Upload
from fedtune.names import CHOSEN, A, B
from fedtune.types import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config


def _axis(name: str) -> int:
    """Return which axis of a factor counts ranks."""
    return 0 if name.endswith(A) else 1


class LoRAA2(Method):
    """Alternating mean of chosen ranks."""

    name = "lora_a2"
    title = "LoRA-A2"
    paper = "arXiv:2410.22815"
    guarantee = "exact"
    mixed_ranks = True
    steady = False

    class Parameters(Method.Parameters):
        """`share`: of all ranks a client may train where `lora.ranks` gives it no budget of its own."""

        share: float = Field(0.5, gt=0, le=1)

        def idle(self, config: Config) -> Iterator[tuple[str, str]]:
            """Name the share where every client has a budget."""
            if config.lora.ranks:
                yield "method.share", "lora.ranks gives every client a budget of its own"

    parameters: Parameters

    def __init__(self, parameters: Method.Parameters, run: RunContext | None = None) -> None:
        # a client's rank is its budget: all have the whole adapter
        self.budgets = run.ranks if run else {}
        super().__init__(parameters, replace(run or RunContext(), ranks={}))

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """The default share of one factor up, on average; both factors down."""
        whole = sizes.a + sizes.b
        return whole / 4, whole

    def trainable(self, round_: int, name: str) -> bool:
        """Train B in odd rounds and A in even ones."""
        return name.endswith(B) if round_ % 2 else name.endswith(A)

    def budget(self, adapter: AdapterState, client: int) -> int:
        """Return how many ranks a client may train, over all layers."""
        own = self.budgets.get(client)
        ranks = sum(m.rank for m in adapter.values())
        share = self.parameters.share
        return own * len(adapter) if own else max(1, int(share * ranks))

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Score all ranks, train the best again, and send those."""
        names = [n for n in start if self.trainable(client.round, n)]
        chosen = self.choose((yield Train(start, names)), start, names, self.budget(client.layout, client.client))
        trained = yield Train(start, names, masks=_masks(start, chosen))
        sent = {n: trained[n].index_select(_axis(n), chosen[n]) for n in names}
        return Fitted({**sent, **{n + CHOSEN: chosen[n] for n in names}})

    def choose(self, trained: Tensors, start: Tensors, names: Sequence[str], budget: int) -> dict[str, Tensor]:
        """Return for each trained tensor the ranks with the largest changes, ascending."""
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

    def payload(self, trained: Tensors, start: Tensors, round_: int) -> dict[str, Tensor]:
        """Send whole factors, as if every rank had been chosen; a run's clients send fewer."""
        sent = super().payload(trained, start, round_)
        if unlike := [n for n, t in sent.items() if t.shape != start[n].shape]:
            raise AdapterError(f"{unlike[0]}: lora_a2 aggregates whole adapters of one rank; its own are budgets")
        return {**sent, **{n + CHOSEN: torch.arange(t.shape[_axis(n)]) for n, t in sent.items()}}

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Expect at most the whole factors, with the ranks chosen, after two trainings: of all, and of those."""
        like = super().upload(state, client, round_, 2 * steps)
        chosen = {n + CHOSEN: torch.arange(t.shape[_axis(n)]) for n, t in like.tensors.items()}
        limit = self.budget(state.adapter, client)

        def problem(sent: Tensors) -> str:
            found = (_wrong(name, whole, sent) for name, whole in like.tensors.items())
            total = sum(sent[n].numel() for n in chosen)
            over = f"{total} ranks, the budget is {limit}" if total > limit else ""
            return next(filter(None, found), over)

        return replace(
            like,
            tensors={**like.tensors, **chosen},
            whole=lambda sent: like.whole(_completed(sent, like.tensors)),
            problem=problem,
            ragged=True,
        )

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Average the trained factor."""
        adapters = [to_tensors(a) for a in self.adapters(updates, state, context.round)]
        trained = [{n: t for n, t in own.items() if self.trainable(context.round, n)} for own in adapters]
        return super().server_step(
            [replace(u, tensors=t) for u, t in zip(updates, trained, strict=True)], state, context
        )


def _wrong(name: str, whole: Tensor, sent: Tensors) -> str:
    """Say which ranks of a tensor do not exist or come twice, or return an empty string."""
    axis, ranks, got = _axis(name), sent[name + CHOSEN], sent[name]
    if ranks.dim() != 1 or ranks.numel() > whole.shape[axis]:
        return f"{name}: {tuple(ranks.shape)} ranks of {whole.shape[axis]}"
    if got.dim() != 2 or got.shape[1 - axis] != whole.shape[1 - axis] or got.shape[axis] != ranks.numel():
        return f"{name}: got {tuple(got.shape)} for {ranks.numel()} ranks of {tuple(whole.shape)}"
    if not all(0 <= r < whole.shape[axis] for r in ranks.tolist()):
        return f"{name}: ranks outside 0 to {whole.shape[axis] - 1}"
    return f"{name}: a rank comes twice" if len(set(ranks.tolist())) != ranks.numel() else ""


def _completed(sent: Tensors, before: Tensors) -> dict[str, Tensor]:
    """Return whole factors: ranks that were not sent are unchanged."""
    return {n: t.clone().index_copy_(_axis(n), sent[n + CHOSEN], sent[n].to(t.dtype)) for n, t in before.items()}


def _masks(start: Tensors, chosen: Tensors) -> dict[str, Tensor]:
    masks = {}
    for name, ranks in chosen.items():
        mask = start[name].new_zeros(start[name].shape)
        masks[name] = mask.index_fill_(_axis(name), ranks, 1.0)
    return masks
