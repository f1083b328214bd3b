"""The loss of labelled positions through a frozen head, a chunk of rows at a time: no large table of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.models import sides
from fedtune.models.attention import by_text, row_logits, run_row, text_weights
from fedtune.models.interface import inner, remembered
from fedtune.models.packing import PackedRow, pack
from fedtune.models.proof import distance, proof_of, still, texts_for

# logits held at a time, in numbers
CHUNK = 2**22
# how far two passes over the same row may be apart
CLOSE = 1e-2


class _Losses(torch.autograd.Function):
    """Cross-entropy of each row [rows] through a frozen linear head.

    The gradients of the hidden states are made together with the losses, while a chunk's logits are at hand. The
    derivatives of what the losses are used for are known later, and multiply them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, expected: Tensor
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=expected.dtype, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, CHUNK // weight.shape[0])
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            logits = F.linear(hidden[part], weight, bias).to(expected.dtype)
            logits.sub_(logits.amax(-1, keepdim=True))
            own = targets[part, None]
            wanted = logits.gather(1, own).squeeze(1)
            sums = logits.exp_().sum(-1)
            losses[part] = sums.log() - wanted
            if slopes is not None:
                logits.mul_((expected[part] / sums)[:, None]).scatter_add_(1, own, -expected[part, None])
                slopes[part] = logits.to(weight.dtype) @ weight
        if slopes is not None:
            ctx.save_for_backward(slopes, expected)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        slopes, expected = ctx.saved_tensors
        # in 16 bits the factor is exact only where it is 1, so the product is made in the losses' precision
        return torch.mul(slopes, (grad / expected)[:, None], out=torch.empty_like(slopes)), None, None, None, None


def linear_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, expected: Tensor) -> Tensor:
    """Return the cross-entropy of each row [rows] in nats, of which any function may be backpropagated.

    Args:
        hidden: last hidden states [rows, hidden].
        weight, bias: of the frozen head [vocabulary, hidden], [vocabulary].
        targets: token ids [rows].
        expected: about the derivative of that function by each loss, not 0 [rows]. It changes nothing but rounding, and
            is of the precision that losses are reckoned in.
    """
    made: Tensor = _Losses.apply(hidden, weight, bias, targets, expected)  # type: ignore[no-untyped-call]
    return made


def _hidden(model: Any, row: PackedRow) -> Tensor:
    """Return the last hidden states [tokens, hidden] of a packed row."""
    states: Tensor = run_row(model, row, inner(model).get_decoder()).last_hidden_state[0]
    return states


def has_plain_head(model: Any) -> bool:
    """Tell whether a model's logits are its head applied to its decoder's output and nothing more.

    What lies between them is tried out once; that the head is a plain layer, without an adapter, each time.
    """
    base = inner(model)
    if not hasattr(base, "get_decoder") or type(base.get_output_embeddings()) is not nn.Linear:
        return False
    if torch.is_grad_enabled() and base.get_output_embeddings().weight.requires_grad:
        return False  # the loss is made with the gradient of the hidden states alone
    known = remembered(base, "fedtune_plain_head", lambda: _tried(model))
    # an adapter may have been put on the head since
    return known and type(base.get_output_embeddings()) is nn.Linear


def _tried(model: Any) -> bool:
    """Exchange the head's logits: they have to come out unchanged, and the decoder's output to go in."""
    base = inner(model)
    row, seen = pack([texts_for(base)[0]]), []

    def exchange(head: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        drawn = 100 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        seen.append((inputs[0], drawn.to(output.device, output.dtype)))
        return seen[-1][1]

    try:
        with still(base), torch.no_grad(), sides.without(model):
            hidden = _hidden(base, row)
            with base.get_output_embeddings().register_forward_hook(exchange):
                logits = run_row(base, row).logits
        given, drawn = seen[0]
        same = given.shape[-2:] == hidden.shape and not (distance(given.flatten(0, -2), hidden) > CLOSE).any()
        return len(seen) == 1 and same and torch.equal(logits.to(drawn.dtype), drawn)
    except Exception:  # whatever a model's own code raises, its head is not used apart
        return False


def _row_log_probabilities(
    model: Any, row: PackedRow, keep: Sequence[int], wanted: Sequence[tuple[int, int]]
) -> Tensor:
    """Return the log-probabilities of `wanted` in a row, some places at a time."""
    if has_plain_head(model):
        hidden, head = _hidden(model, row), inner(model).get_output_embeddings()
        table, made = hidden.index_select(0, row.index(keep, hidden.device)), head
        rows = max(1, CHUNK // head.weight.shape[0])
    else:
        table, made = row_logits(model, row, keep), nn.Identity()
        rows = max(1, CHUNK // table.shape[-1])
    found, done = [], 0
    for first in range(0, len(table), rows):
        logs = made(table[first : first + rows]).float().log_softmax(-1)
        part = [(i - first, token) for i, token in wanted[done:] if i < first + rows]
        places, tokens = torch.tensor(part, dtype=torch.long, device=logs.device).view(-1, 2).unbind(1)
        found.append(logs[places, tokens])
        done += len(part)
    return torch.cat(found)


def log_probabilities(
    model: Any,
    texts: Sequence[Sequence[int]],
    keep: Sequence[int],
    wanted: Sequence[tuple[int, int]],
    *,
    share_prefix: bool = False,
) -> Tensor:
    """Return the log-probabilities of some tokens at some places; no table of all logits is held in float32.

    Args:
        model, texts, keep, share_prefix: see `packed_logits`.
        wanted: (index into `keep`, token), in the order of the former.

    Returns:
        float32 [len(wanted)], in nats.
    """
    if len(texts) > 1 and not proof_of(model).packs(texts):
        found, start = [], 0
        for text, own in by_text(texts, keep):
            mine = [(i - start, token) for i, token in wanted if start <= i < start + len(own)]
            found += [log_probabilities(model, [text], own, mine)] if mine else []
            start += len(own)
        return torch.cat(found)
    with text_weights(model, texts, keep) as shareable:
        row = pack(texts, share_prefix=share_prefix and shareable)
        return _row_log_probabilities(model, row, keep, wanted)


def row_losses(model: Any, row: PackedRow, keep: Sequence[int], targets: Sequence[int], expected: Tensor) -> Tensor:
    """Return the cross-entropy of the labels of a packed row [len(keep)], to be differentiated.

    Args:
        model: a causal language model with a plain head, bare or wrapped by PEFT.
        row: the texts.
        keep, targets: places in the texts joined end to end that predict a label, and those labels.
        expected: see `linear_losses`.
    """
    hidden = _hidden(model, row)
    head = inner(model).get_output_embeddings()
    wanted = torch.tensor(targets, dtype=torch.long, device=hidden.device)
    chosen = hidden.index_select(0, row.index(keep, hidden.device))
    return linear_losses(chosen, head.weight, head.bias, wanted, expected)
