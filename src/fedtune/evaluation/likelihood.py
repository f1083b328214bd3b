"""Score answers by their likelihood: every model gives one, whatever its manners of speech.

The score of an answer is the mean log-probability of its tokens (length-normalised); for a letter that is
the letter's own log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.data.encode import Text, encode_pair, escape_special, render, special_tokens
from fedtune.domains.base import Item
from fedtune.models.head import log_probabilities
from fedtune.models.packing import runs
from fedtune.types import ModelError

MAX_TOKENS = 4096


def prompt_text(item: Item, wrap: Callable[[str], str], tokenizer: Any, config: Config) -> str:
    """Return the prompt of an item: the training template, a chat template, or the official wrapping."""
    if config.eval.prompt == "official":
        return wrap(item.prompt)
    question = escape_special(item.question, special_tokens(tokenizer))
    if config.eval.prompt == "training":
        return render(config.prompt.template, question)
    return _chat(question, tokenizer)


def _chat(question: str, tokenizer: Any) -> str:
    turns = [{"role": "user", "content": question}]
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        )
    except Exception as err:  # a template can raise whatever it likes
        raise ValueError(f"the chat template refuses a question: {type(err).__name__}: {err}") from err


def check_prompt(tokenizer: Any, config: Config) -> None:
    """Refuse `eval.prompt = "chat"` for a model that has no chat template, or one that takes no question alone.

    Raises:
        ModelError: before anything is computed.
    """
    if config.eval.prompt != "chat":
        return
    other = 'set eval.prompt to "training" or "official"'
    try:
        _chat("What is the answer?", tokenizer)
    except ValueError as err:
        why = "it has no chat template" if "chat_template is not set" in str(err) else str(err)
        raise ModelError(f"{config.model.name}: eval.prompt is chat and {why}; {other}") from err


def _candidates(item: Item, wrap: Callable[[str], str], tokenizer: Any, config: Config) -> list[Text]:
    prompt = prompt_text(item, wrap, tokenizer, config)
    # a chat template writes all special tokens itself, those at the beginning too
    special = config.eval.prompt != "chat"
    return [encode_pair(tokenizer, prompt, answer, special=special) for answer in item.answers]


def _shared(candidates: Sequence[Text]) -> bool:
    """Tell whether all candidates are one token after the same prompt: then one pass scores them all."""
    prompts = {c.ids[: c.start] for c in candidates}
    return len(prompts) == 1 and all(c.labels == 1 for c in candidates)


def _texts(candidates: Sequence[Text]) -> list[tuple[int, ...]]:
    """Return the texts that have to pass through the model for one item."""
    return [candidates[0].ids[: candidates[0].start]] if _shared(candidates) else [c.ids for c in candidates]


@dataclass
class _Row:
    """What passes through the model for some items, and what is read from it.

    Attributes:
        texts: token ids of each.
        keep: positions in the joined texts that predict an answer's token.
        wanted: (index into `keep`, token) of each answer's tokens.
        sizes: for each item, how many tokens each of its answers has.
    """

    texts: list[tuple[int, ...]] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)
    wanted: list[tuple[int, int]] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)


def _plan(batch: Sequence[list[Text]]) -> _Row:
    """Lay out some items' candidates; single tokens after the same prompt are read at one place."""
    row, offset = _Row(), 0
    for candidates in batch:
        shared = _shared(candidates)
        if shared:
            row.wanted += [(len(row.keep), c.ids[-1]) for c in candidates]
            row.keep.append(offset + candidates[0].start - 1)
        for text, candidate in zip(_texts(candidates), candidates, strict=False):
            if not shared:
                row.wanted += enumerate(candidate.ids[candidate.start :], len(row.keep))
                row.keep += range(offset + candidate.start - 1, offset + len(text) - 1)
            row.texts.append(text)
            offset += len(text)
        row.sizes.append([c.labels for c in candidates])
    return row


def _means(logs: Tensor, row: _Row) -> list[list[float]]:
    """Return the mean log-probability of each answer of each item."""
    each = iter(torch.split(logs, [size for sizes in row.sizes for size in sizes]))
    return [[float(next(each).mean()) for _ in sizes] for sizes in row.sizes]


@torch.inference_mode()
def score(
    model: Any, tokenizer: Any, items: Sequence[Item], wrap: Callable[[str], str], config: Config
) -> Iterator[list[list[float]]]:
    """Yield, batch by batch and in order, each item's score of each answer (mean log-probability, nats per token).

    `wrap` is the official prompt around an item's own.
    """
    encoded = (_candidates(item, wrap, tokenizer, config) for item in items)
    for chosen in runs(encoded, lambda candidates: sum(map(len, _texts(candidates))), MAX_TOKENS):
        row = _plan(chosen)
        yield _means(log_probabilities(model, row.texts, row.keep, row.wanted, share_prefix=True), row)
