"""Decoding one text at a time with transformers' own cache, for models that a running batch is not proven for.

State spaces, convolutions and caches of other kinds cannot be padded, joined or taken back by columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtune.evaluation.decode import Decoder, Done, PassContext, Row, likeliest, run
from fedtune.models import sides
from fedtune.models.interface import inner, plain_pass
from fedtune.models.proof import far, proof_of, texts_for

_BATCHES = "fedtune_batches"
# more than any text has
ENDLESS = 2**20


def _alone(base: Any, row: Row, done: Done) -> None:
    """Decode a row to its end, the model's own generation settings left out: how a row is decoded is the row's."""
    from transformers import GenerationConfig

    if row.blind:
        raise ValueError("a row that ends in padding cannot be decoded alone")
    ids = torch.tensor([list(row.prompt)], device=base.device)

    def step(seen: Tensor, scores: Tensor) -> Tensor:
        (best,) = likeliest(scores)
        token = row.choose(scores[0]) if row.choose else best
        row.new.append(token)
        row.ended = done(row)
        return torch.full_like(scores, float("-inf")).index_fill_(-1, torch.tensor(token, device=scores.device), 0)

    was, base.generation_config = base.generation_config, GenerationConfig()
    try:
        base.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=ENDLESS,
            pad_token_id=0,
            logits_processor=[step],
            stopping_criteria=[lambda seen, scores, **_: torch.tensor([row.ended], device=seen.device)],
        )
    finally:
        base.generation_config = was


def _taught(decoder: Decoder, texts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """Let a decoder go over known texts, wrong drafts included; return the logits it had at each step."""
    seen: list[list[Tensor]] = [[] for _ in texts]

    def row(index: int, known: int) -> Row:
        def choose(logits: Tensor) -> int:
            seen[index].append(logits.detach())
            return texts[index][known + len(seen[index]) - 1]

        return Row(index, list(texts[index][:known]), choose=choose)

    decoder.admit([row(0, len(texts[0]) - 5), row(1, len(texts[1]) - 4)])
    decoder.advance()
    if decoder.joins:
        decoder.admit([row(2, len(texts[2]) - 3)])
    while decoder.rows:
        decoder.advance()
    return seen


class _Misled(Decoder):
    """A decoder whose drafts are all wrong, so that what it takes back is seen to be gone."""

    def _draft(self, row: Row, most: int) -> list[int]:
        return [] if self._windowed else [row.prompt[0], row.prompt[1]]


def _tried(model: Any) -> bool:
    """Hold a running batch against each text alone."""
    base = inner(model)
    texts = texts_for(base)
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
    coarse = torch.bfloat16 if getattr(base, "is_quantized", False) else dtype
    decoder = _Misled(base, lambda row: len(row.prompt) + len(row.new) == len(texts[row.index]), drafts=False)
    try:
        for text, rows in zip(texts, _taught(decoder, texts), strict=True):
            alone = plain_pass(base, text).logits[0][len(text) - 1 - len(rows) : -1]
            if rows and far(torch.stack(rows).float().cpu(), alone.float().cpu(), coarse):
                return False
    except Exception:  # whatever a model's own code raises, it cannot do this
        return False
    return True


@torch.no_grad()
def batches(model: Any, longest: int = 0) -> bool:
    """Tell whether a model decodes several texts of up to `longest` tokens in a running batch as it does each alone.

    It is tried out once.
    """
    base = inner(model)
    known = getattr(base, _BATCHES, None)
    if known is None:
        with sides.without(model):  # they are the rows' own
            known = not proof_of(model).why and _tried(model)
        setattr(base, _BATCHES, known)
    return bool(known) and longest <= proof_of(model).longest


def decode(
    model: Any, groups: Sequence[Sequence[Row]], most: int, longest: int, done: Done, context: PassContext | None = None
) -> Iterator[None]:
    """Decode groups of rows to their end, in a running batch where that is proven. Yields whenever rows may have ended.

    Args:
        model: in evaluation mode.
        groups, most: as `decode.run` takes them.
        longest: tokens that a row has in the end, at most.
        done, context: as `Decoder` takes them.
    """
    if batches(model, longest):
        yield from run(Decoder(model, done, context, drafts=True), groups, most)
        return
    base = inner(model)
    for group in groups:
        for row in group:
            with context([row]) if context else contextlib.nullcontext():
                _alone(base, row, done)
        yield
