"""Generate completions: rows join and leave a running batch; stop words are texts, whatever tokens they span."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtune.evaluation.alone import decode
from fedtune.evaluation.decode import PassContext, Row
from fedtune.evaluation.programs import truncate
from fedtune.models import sides
from fedtune.models.attention import text_features
from fedtune.types import derive_seed

BATCH = 16
# tokens looked at for a stop word beyond its own
MARGIN = 8


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


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return probabilities [vocabulary] restricted to the smallest set whose mass reaches `top_p`."""
    probabilities = logits.softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return kept / kept.sum()


def _chooser(decoding: Decoding, seed: int) -> Callable[[Tensor], int] | None:
    """Return what picks a sampled row's tokens, from a random stream of its own; None for greedy."""
    if decoding.temperature == 0:
        return None
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        chances = nucleus(logits.float().cpu() / decoding.temperature, decoding.top_p)
        return int(torch.multinomial(chances, 1, generator=generator))

    return choose


def _finished(row: Row, stop: tuple[str, ...], tokenizer: Any, eos: set[int], decoding: Decoding) -> bool:
    """Tell whether a row is done: end of text, a stop word (whatever tokens it spans), or no room left."""
    if row.new[-1] in eos or len(row.prompt) + len(row.new) >= decoding.length or len(row.new) == decoding.new_tokens:
        return True
    # asked after every token, so a word that is there ends in the last one: it has at most one token a byte
    tail = max((len(word.encode()) for word in stop), default=0) + MARGIN
    return bool(stop) and any(word in tokenizer.decode(row.new[-tail:]) for word in stop)


def _text(row: Row, stop: tuple[str, ...], tokenizer: Any, eos: set[int]) -> str:
    new = row.new[:-1] if row.new and row.new[-1] in eos else row.new
    return truncate(str(tokenizer.decode(new, skip_special_tokens=True)), stop)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    known = model.generation_config.eos_token_id
    several = known if isinstance(known, (list, tuple)) else [known]
    return {int(t) for t in (*several, tokenizer.eos_token_id) if t is not None}


def _mixture(model: Any, rows: Sequence[Row]) -> PassContext | None:
    """Return what sets the adapters' weights for the rows of a pass, where they depend on the prompt."""
    mixer = sides.of(model)
    if mixer is None or not mixer.per_text or not rows:
        return None
    prompts = {row.index: row.prompt for row in rows}
    known = text_features(model, list(prompts.values()))
    place = {index: i for i, index in enumerate(prompts)}

    def context(going: Sequence[Row]) -> contextlib.AbstractContextManager[None]:
        chosen = known[[place[row.index] for row in going]]
        return mixer.mixed(lambda: chosen, lambda w: w[:, None, None])

    return context


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
    """Yield completions in order, some prompts at a time: for each prompt its samples, cut at the stop words.

    Args:
        model: in evaluation mode.
        tokenizer: with a pad token.
        stops: stop words of each prompt.
        places: what keys each prompt's random stream (its place in the whole set); its index by default.
    """
    eos, step = _end_tokens(model, tokenizer), max(1, BATCH // samples)
    rows: list[list[Row]] = []
    for i, prompt in enumerate(prompts):
        ids = list(tokenizer(prompt)["input_ids"])
        seeds = [derive_seed(decoding.seed, "sample", places[i] if places else i, k) for k in range(samples)]
        full = len(ids) >= decoding.length
        rows.append([Row(i, ids, choose=_chooser(decoding, seed), ended=full) for seed in seeds])
    chunks = [rows[start : start + step] for start in range(0, len(rows), step)]
    open_rows = [[row for own in chunk for row in own if not row.ended] for chunk in chunks]
    every = [row for chunk in open_rows for row in chunk]
    passes = decode(
        model,
        [c for c in open_rows if c],
        BATCH + step * samples // 2,
        decoding.length,
        lambda row: _finished(row, stops[row.index], tokenizer, eos, decoding),
        _mixture(model, every),
    )
    given = 0
    for _ in itertools.chain(passes, [None]):
        while given < len(chunks) and all(row.ended for own in chunks[given] for row in own):
            yield [[_text(row, stops[row.index], tokenizer, eos) for row in own] for own in chunks[given]]
            given += 1
