"""Generate completions: batched, left-padded, cached; stop words as text; finished rows leave the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtune.evaluation.programs import truncate
from fedtune.models import sides
from fedtune.models.attention import text_features
from fedtune.types import derive_seed

BATCH = 16


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus; 1 keeps everything.
        length: tokens of prompt and completion together, at most.
        new_tokens: of the completion alone, at most; 0 is no limit of its own.
        seed: of the samples; each row draws from a stream of its own, so a batch does not change a row.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    length: int = 1024
    new_tokens: int = 0
    seed: int = 0


@dataclass
class _Row:
    """A completion in the making."""

    index: int
    prompt: list[int]
    stop: tuple[str, ...]
    generator: torch.Generator
    new: list[int]


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return probabilities [vocabulary] restricted to the smallest set whose mass reaches `top_p`."""
    probabilities = logits.softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return kept / kept.sum()


def _choose(logits: Tensor, row: _Row, decoding: Decoding) -> int:
    if decoding.temperature == 0:
        return int(logits.argmax())
    chances = nucleus(logits.float().cpu() / decoding.temperature, decoding.top_p)
    return int(torch.multinomial(chances, 1, generator=row.generator))


def _finished(row: _Row, tokenizer: Any, eos: set[int], decoding: Decoding) -> bool:
    """Tell whether a row is done: end of text, a stop word (whatever tokens it spans), or no room left."""
    if row.new[-1] in eos or len(row.prompt) + len(row.new) >= decoding.length or len(row.new) == decoding.new_tokens:
        return True
    return bool(row.stop) and any(word in tokenizer.decode(row.new) for word in row.stop)


def _text(row: _Row, tokenizer: Any, eos: set[int]) -> str:
    new = row.new[:-1] if row.new and row.new[-1] in eos else row.new
    return truncate(str(tokenizer.decode(new, skip_special_tokens=True)), row.stop)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    known = model.generation_config.eos_token_id
    several = known if isinstance(known, (list, tuple)) else [known]
    return {int(t) for t in (*several, tokenizer.eos_token_id) if t is not None}


def _padded(rows: Sequence[_Row], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(r.prompt) for r in rows)
    ids = torch.tensor([[pad] * (width - len(r.prompt)) + r.prompt for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in rows], device=device)
    return ids, mask


def _mixture(model: Any, rows: Sequence[_Row]) -> Callable[[Sequence[_Row]], contextlib.AbstractContextManager[None]]:
    """Return what sets the adapters' weights for the rows still in a batch, where they depend on the prompt."""
    mixer = sides.of(model)
    if mixer is None or not mixer.per_text or not rows:
        return lambda going: contextlib.nullcontext()
    known = text_features(model, [row.prompt for row in rows])
    place = {id(row): i for i, row in enumerate(rows)}

    def weigh(going: Sequence[_Row]) -> contextlib.AbstractContextManager[None]:
        chosen = known[[place[id(row)] for row in going]]
        return mixer.mixed(lambda: chosen, lambda w: w[:, None, None])

    return weigh


def _decode_batch(model: Any, tokenizer: Any, rows: list[_Row], decoding: Decoding) -> None:
    """Decode a batch to its end; a row that is done leaves it, cache and all."""
    from transformers import DynamicCache

    eos = _end_tokens(model, tokenizer)
    cache: Any = DynamicCache()
    weigh = _mixture(model, rows)
    ids, mask = _padded(rows, tokenizer.pad_token_id, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    while rows:
        with weigh(rows):
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        for row, logits in zip(rows, output.logits[:, -1], strict=True):
            row.new.append(_choose(logits, row, decoding))
        going = [i for i, row in enumerate(rows) if not _finished(row, tokenizer, eos, decoding)]
        if len(going) < len(rows):
            keep = torch.tensor(going, dtype=torch.long, device=mask.device)
            rows = [rows[i] for i in going]
            mask, positions = mask[keep], positions[keep]
            if rows:
                cache.batch_select_indices(keep)
        if rows:
            ids = torch.tensor([[row.new[-1]] for row in rows], device=mask.device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    stops: Sequence[tuple[str, ...]],
    decoding: Decoding,
    samples: int = 1,
    places: Sequence[int] | None = None,
) -> Iterator[list[list[str]]]:
    """Yield completions, batch by batch and in order: for each prompt its samples, cut at the stop words.

    Args:
        model: in evaluation mode.
        tokenizer: with a pad token.
        prompts: texts to continue.
        stops: stop words of each.
        decoding: how.
        samples: of each prompt.
        places: what keys each prompt's random stream (its place in the whole set); its index by default.
    """
    step = max(1, BATCH // samples)
    for start in range(0, len(prompts), step):
        chosen = range(start, min(start + step, len(prompts)))
        rows = []
        for i in chosen:
            ids = list(tokenizer(prompts[i])["input_ids"])
            for sample in range(samples):
                seed = derive_seed(decoding.seed, "sample", places[i] if places else i, sample)
                rows.append(_Row(i, ids, stops[i], torch.Generator().manual_seed(seed), []))
        eos = _end_tokens(model, tokenizer)
        _decode_batch(model, tokenizer, [r for r in rows if len(r.prompt) < decoding.length], decoding)
        yield [[_text(r, tokenizer, eos) for r in rows if r.index == i] for i in chosen]
