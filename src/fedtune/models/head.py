"""The loss of labelled positions through a frozen head, a chunk of rows at a time: no large table of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.models.attention import inner, run_row
from fedtune.models.packing import PackedRow, pack

# logits held at a time, in numbers
CHUNK = 2**22
_PLAIN = "fedtune_plain_head"


class _Loss(torch.autograd.Function):
    """Cross-entropy of each row [rows], weighed, through a frozen linear head.

    The gradient of the hidden states is made together with the loss, while a chunk's logits are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(hidden), dtype=shares.dtype, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, CHUNK // weight.shape[0])
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            logits = F.linear(hidden[part], weight, bias).to(shares.dtype)
            logits.sub_(logits.amax(-1, keepdim=True))
            own = targets[part, None]
            wanted = logits.gather(1, own).squeeze(1)
            sums = logits.exp_().sum(-1)
            losses[part] = sums.log() - wanted
            if slopes is not None:
                logits.mul_((shares[part] / sums)[:, None]).scatter_add_(1, own, -shares[part, None])
                slopes[part] = logits.to(weight.dtype) @ weight
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(losses)
        return (losses * shares).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes.mul(grad.to(slopes.dtype)), None, None, None, None


def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sum_i share_i CE_i, to be backpropagated once, and each CE_i [rows] in nats.

    Args:
        hidden: last hidden states [rows, hidden].
        weight, bias: of the frozen head [vocabulary, hidden], [vocabulary].
        targets: token ids [rows].
        shares: what each row counts for, in the precision that losses are reckoned in.
    """
    made: tuple[Tensor, Tensor] = _Loss.apply(hidden, weight, bias, targets, shares)  # type: ignore[no-untyped-call]
    return made


def _hidden(model: Any, row: PackedRow) -> Tensor:
    """Return the last hidden states [tokens, hidden] of a packed row."""
    states: Tensor = run_row(inner(model).get_decoder(), row).last_hidden_state[0]
    return states


def has_plain_head(model: Any) -> bool:
    """Tell whether a model's logits are its head applied to its decoder's output and nothing more; tried out once."""
    base = inner(model)
    known = getattr(base, _PLAIN, None)
    if known is None:
        known = _tried(base)
        setattr(base, _PLAIN, known)
    return bool(known)


@torch.no_grad()
def _tried(base: Any) -> bool:
    head = base.get_output_embeddings() if hasattr(base, "get_decoder") else None
    if type(head) is not nn.Linear:
        return False
    row = pack([[0, 1, 2, 3]])
    was_training = base.training
    base.eval()
    try:
        hidden = _hidden(base, row)
        logits: Tensor = run_row(base, row).logits[0]
        return torch.equal(head(hidden), logits) or torch.allclose(head(hidden), logits, rtol=1e-3, atol=1e-4)
    finally:
        base.train(was_training)


def row_losses(
    model: Any, row: PackedRow, keep: Sequence[int], targets: Sequence[int], shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighed sum of losses of a packed row, and each position's loss [len(keep)].

    Args:
        model: a causal language model with a plain head, bare or wrapped by PEFT.
        row: the texts.
        keep: places in the texts joined end to end that predict a label.
        targets: those labels.
        shares: what each counts for.
    """
    hidden = _hidden(model, row)
    index = torch.tensor([row.place[i] for i in keep], dtype=torch.long, device=hidden.device)
    head = inner(model).get_output_embeddings()
    wanted = torch.tensor(targets, dtype=torch.long, device=hidden.device)
    return linear_loss(hidden.index_select(0, index), head.weight, head.bias, wanted, shares)
