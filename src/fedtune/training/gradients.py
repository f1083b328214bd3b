"""The gradient of a step, pass by pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from fedtune.models.adapted import AdaptedModel
from fedtune.models.interface import attending
from fedtune.models.proof import proof_of
from fedtune.training.loss import Part, Step, in_one_row, joint_loss, keyed, label_logs, lots, passes, regrouped
from fedtune.types import derive_seed


@contextlib.contextmanager
def _passing(adapted: AdaptedModel, parts: Sequence[Part], exact: bool) -> Iterator[None]:
    """Let parts pass through the model and back, with the attention and the random draws that are theirs."""
    model, texts = adapted.model, [text for part in parts for text in part.texts]
    with contextlib.ExitStack() as during:
        during.enter_context(attending(model, packed=proof_of(model).packs(texts)))
        if not exact:
            during.enter_context(keyed(adapted.keys, parts, adapted.device))
        if model.training and proof_of(model).random:
            during.enter_context(torch.random.fork_rng())
            torch.manual_seed(derive_seed(parts[0].key, "own dropout", parts[0].first))
        yield


def _one_lot(
    adapted: AdaptedModel, parts: Sequence[Part], exact: bool, on_rows: Callable[[list[int]], None] | None
) -> list[float]:
    """Backpropagate the losses of parts that pass through the model together; return each part's."""
    if not in_one_row(adapted.model, parts):
        return [_text_by_text(adapted, part, exact) for part in parts]
    with _passing(adapted, parts, exact):
        loss, own = joint_loss(adapted.model, parts, share_prefix=exact, on_rows=on_rows)
        loss.backward()  # type: ignore[no-untyped-call]
    return own


def _text_by_text(adapted: AdaptedModel, part: Part, exact: bool) -> float:
    """Backpropagate the loss of a part whose texts cannot lie in one row; return it.

    The derivatives of the loss by the labels' log-probabilities are known when all texts have passed; then each passes
    again for its gradient. So the activations of one text are kept at a time.
    """
    made, texts = [], list(part.by_text())
    for text in texts:
        with torch.no_grad(), _passing(adapted, [text], exact):
            made.append(label_logs(adapted.model, [text]))
    logs = torch.cat(made).requires_grad_()
    loss = part.loss(logs)
    (slopes,) = torch.autograd.grad(loss, logs)
    for text, own in zip(texts, torch.split(slopes, [text.labels for text in texts]), strict=True):
        with _passing(adapted, [text], exact):
            label_logs(adapted.model, [text]).backward(own)  # type: ignore[no-untyped-call]
    return float(loss.detach())


def one_pass(
    adapted: AdaptedModel, parts: Sequence[Part], *, exact: bool, on_rows: Callable[[list[int]], None] | None = None
) -> list[float]:
    """Backpropagate the losses of some parts of steps, in one pass if they may; return each part's."""
    apart = lots(adapted.model, parts)
    losses = [_one_lot(adapted, lot, exact, on_rows) for lot in apart]
    return losses[0] if len(apart) == 1 else regrouped([own for (own,) in losses], parts)


def backpropagate(adapted: AdaptedModel, step: Step, tokens: int, *, exact: bool) -> float:
    """Backpropagate the loss of one client's step, whatever the micro-batches; return it."""
    return sum(sum(one_pass(adapted, list(parts.values()), exact=exact)) for parts in passes([step], tokens))
