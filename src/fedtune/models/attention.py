"""Several texts through a model, as one unpadded row where that is proven to change nothing, else one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fedtune.models import sides
from fedtune.models.interface import inner, packed_pass, plain_pass
from fedtune.models.packing import PackedRow, pack, runs
from fedtune.models.proof import proof_of
from fedtune.types import ModelError

# tokens of a pass that only reads the states at the texts' ends
BATCH = 4096


def run_row(model: Any, row: PackedRow, module: Any = None, **options: Any) -> Any:
    """Run a row through a causal language model, bare or wrapped by PEFT, or through a part of it.

    Raises ModelError for several texts in one row, where that is not proven.
    """
    texts = [range(span.before + span.length) for span in row.spans]
    if proof_of(model).packs(texts):
        return packed_pass(model, row, module, **options)
    if len(texts) > 1:
        raise ModelError(f"{type(inner(model)).__name__}: these texts cannot lie in one row: {proof_of(model).why}")
    return plain_pass(model, row.ids, module, **options)


def text_features(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return the base model's last hidden state at the end of each text [texts, hidden], adapters left out."""
    limit = BATCH if proof_of(model).packs(texts) else 0
    return torch.cat([_features(model, batch) for batch in runs(texts, len, limit)])


def _features(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    row = pack(texts)
    ends = torch.tensor([span.end - 1 for span in row.spans], device=next(model.parameters()).device)
    adapters_off = model.disable_adapter() if sides.of(model) else contextlib.nullcontext()
    with torch.no_grad(), adapters_off, sides.without(model):
        few = {"logits_to_keep": ends[-1:]} if proof_of(model).keeps else {}  # none is wanted
        output = run_row(model, row, output_hidden_states=True, **few)
    last: Tensor = output.hidden_states[-1]
    return last[0, ends]


def row_logits(model: Any, row: PackedRow, keep: Sequence[int]) -> Tensor:
    """Run a row and return the logits [len(keep), vocabulary] at places in the texts joined end to end."""
    index = row.index(keep, next(model.parameters()).device)
    direct = proof_of(model).keeps
    output = run_row(model, row, **({"logits_to_keep": index} if direct else {}))
    logits: Tensor = output.logits[0]
    return logits if direct else logits[index]


@contextlib.contextmanager
def text_weights(model: Any, texts: Sequence[Sequence[int]], keep: Sequence[int]) -> Iterator[bool]:
    """Set a second adapter's weight for each text of a pass, where there is one whose weight depends on the text.

    It depends on the text up to its first kept place, which is where a prompt ends: never on the answer.

    Yields whether the shared prefix of texts may be computed once: not if a weight differs between them.
    """
    mixer = sides.of(model)
    if mixer is None or not mixer.per_text:
        yield True
        return
    lengths = torch.tensor([len(t) for t in texts], device=next(model.parameters()).device)
    prompts = [text[: own[0] + 1] if own else text for text, own in by_text(texts, keep)]
    with mixer.mixed(lambda: text_features(model, prompts), lambda w: w.repeat_interleave(lengths)[None, :, None]):
        yield False


def row_weights(model: Any, texts: Sequence[Sequence[int]], copies: int = 1) -> AbstractContextManager[None]:
    """Set a second adapter's weight as `text_weights` does, for a batch with a row, or several, of each text."""
    mixer = sides.of(model)
    if mixer is None:
        return contextlib.nullcontext()
    return mixer.mixed(lambda: text_features(model, texts), lambda w: w.repeat_interleave(copies)[:, None, None])


def by_text(texts: Sequence[Sequence[int]], keep: Sequence[int]) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Yield each text with the places in it that are kept, of places in ascending order in the texts joined."""
    ends = list(accumulate(map(len, texts)))
    for text, end in zip(texts, ends, strict=True):
        start = end - len(text)
        yield text, [i - start for i in keep if start <= i < end]


def packed_logits(
    model: Any, texts: Sequence[Sequence[int]], keep: Sequence[int], *, share_prefix: bool = False
) -> Tensor:
    """Return the logits [len(keep), vocabulary] of several texts, in one row without padding where that is proven.

    Args:
        model: a causal language model, bare or wrapped by PEFT.
        texts: token ids of each text.
        keep: positions in the joined texts, ascending.
        share_prefix: see `pack`.
    """
    if len(texts) > 1 and not proof_of(model).packs(texts):
        return torch.cat([packed_logits(model, [text], own) for text, own in by_text(texts, keep) if own])
    with text_weights(model, texts, keep) as shareable:
        return row_logits(model, pack(texts, share_prefix=share_prefix and shareable), keep)
