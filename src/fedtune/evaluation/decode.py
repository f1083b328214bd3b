"""Continuous batching with a cache, and prompt-lookup decoding of greedy rows.

A draft is what followed a row's last tokens where they occurred before. One pass verifies all draft tokens, and only
those that the model chooses itself are kept, so the text is that of decoding token by token.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedtune.models.interface import inner
from fedtune.models.packing import MIN_PREFIX, common_prefix

# draft tokens at first, and the longest run of last tokens that is looked up
DRAFT, LOOKUP = 12, 3
LONGEST_DRAFT = 64  # draft tokens at most in a row whose drafts keep being right
BUSY = 32  # tokens of a pass that hardly take longer than one: memory is what decoding waits for
SLACK = 64  # columns of the cache that no row uses any more, before they are taken out

NO_NUMBERS = "the model's logits are not numbers (NaN or infinite)"


def likeliest(logits: Tensor) -> Iterator[int]:
    """Yield the likeliest token of each row of logits [rows, vocabulary]; nothing is asked of rows not reached.

    Raises:
        ValueError: a row has a NaN, or its largest logit is infinite.
    """
    tokens = logits.argmax(-1)
    largest = logits.gather(-1, tokens[:, None])[:, 0].isfinite()
    for token, number in zip(tokens.tolist(), largest.tolist(), strict=True):
        if not number:
            raise ValueError(NO_NUMBERS)
        yield token


def check_scores(ids: Any, scores: Tensor) -> Tensor:
    """Refuse, as a logits processor of `generate`, scores [rows, vocabulary] that have no likeliest token."""
    list(likeliest(scores))
    return scores


class History:
    """The tokens of a text, and where its last ones stood before; a token costs the same however long the text is."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        self._before: list[int | None] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self._tokens.append(token)
            ends = [tuple(self._tokens[-n:]) for n in range(1, min(LOOKUP, len(self._tokens)) + 1)]
            self._before = [self._latest.get(end) for end in ends]
            self._latest |= dict.fromkeys(ends, len(self._tokens))

    def draft(self, most: int) -> list[int]:
        """Return `most` tokens as they followed the last ones where those last stood before; nothing if nowhere.

        Where that was a short while ago, the text is taken to go round.
        """
        place = next((p for p in reversed(self._before) if p is not None), None)
        if place is None:
            return []
        return [self._tokens[place + i % (len(self._tokens) - place)] for i in range(most)]


@dataclass(eq=False)
class Row:
    """A text in the making.

    Attributes:
        index: its number, for whoever asked.
        prompt: token ids.
        new: what was decoded so far.
        blind: whether the last token of the prompt is padding, which is never seen and stands at position 1, but whose
            logits decide the first new token all the same (right-padded batches of `generate` did that).
        choose: picks the next token of this row from its logits; None is greedy.
        ended: nothing more is decoded.
        draft_length: draft tokens of the next pass; it doubles as long as all are accepted.
        history: of prompt and new tokens, as far as it was needed.
    """

    index: int
    prompt: Sequence[int]
    new: list[int] = field(default_factory=list)
    blind: bool = False
    choose: Callable[[Tensor], int] | None = None
    ended: bool = False
    draft_length: int = 0
    history: History = field(default_factory=History)


PassContext = Callable[[Sequence[Row]], AbstractContextManager[Any]]
Done = Callable[[Row], bool]


class Decoder:
    """A batch that is being decoded.

    Args:
        model: in evaluation mode.
        done: tells, after each token, whether a row is finished.
        context: the context in which a pass over some rows runs.
        drafts: prompt-lookup decoding where a row is greedy (not for models whose layers see only a window).
    """

    def __init__(self, model: Any, done: Done, context: PassContext | None = None, *, drafts: bool) -> None:
        self._model = model
        self._done = done
        self._context = context
        self._windowed = windowed(model)
        self._most = DRAFT if drafts and not self._windowed else 0
        self._last_only = "logits_to_keep" in inspect.signature(inner(model).forward).parameters
        known = model.config.get_text_config()
        # some models have a table of positions: a draft must not look beyond its end
        self._positions = int(getattr(known, "max_position_embeddings", 0) or 2**31)
        self.rows: list[Row] = []
        self.passes = 0
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)

    def admit(self, rows: Sequence[Row]) -> None:
        """Start rows, which join those under way; the shared prefix of their prompts is computed once."""
        from transformers import DynamicCache

        cache = DynamicCache()
        first = self._prefix(rows, cache)
        suffixes = [row.prompt[first:] for row in rows]
        width, device = max(map(len, suffixes)), inner(self._model).device
        ids = torch.tensor([[0] * (width - len(s)) + [*s] for s in suffixes], device=device)
        seen = [
            [1] * first + [0] * (width - len(s)) + [1] * (len(s) - row.blind) + [0] * row.blind
            for row, s in zip(rows, suffixes, strict=True)
        ]
        mask = torch.tensor(seen, device=device)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)[:, first:]
        logits = self._pass(rows, ids, mask, positions, cache, last=True)
        for row, own in zip(rows, logits, strict=True):
            self._add(row, own[-1:], [])
        self._join(list(rows), cache, mask)
        self._leave()

    def _prefix(self, rows: Sequence[Row], cache: Any) -> int:
        """Fill a cache with the shared prefix of the rows' prompts; return how many tokens it has."""
        common = common_prefix([row.prompt[: len(row.prompt) - row.blind] for row in rows])
        if len(rows) == 1 or common < MIN_PREFIX or self._windowed or self._context:
            return 0
        ids = torch.tensor([list(rows[0].prompt[:common])], device=inner(self._model).device)
        places = torch.arange(common, device=ids.device)[None]
        self._pass(rows[:1], ids, torch.ones_like(ids), places, cache, last=True)
        cache.batch_repeat_interleave(len(rows))
        return common

    def advance(self) -> None:
        """Decode at least one more token of every row."""
        # a pass over few tokens costs what one over a single token does; over many, drafts have to be good ones
        most = min(self._most, BUSY // len(self.rows) - 1)
        room = [self._positions - int(used) - 1 for used in self._mask.sum(-1)]
        drafts = [self._draft(row, min(max(most, row.draft_length), n)) for row, n in zip(self.rows, room, strict=True)]
        width = 1 + max(map(len, drafts))
        spare = [width - 1 - len(g) for g in drafts]
        device = self._mask.device
        ids = torch.tensor(
            [[r.new[-1], *g, *[0] * n] for r, g, n in zip(self.rows, drafts, spare, strict=True)], device=device
        )
        fresh = torch.tensor([[1] * (width - n) + [0] * n for n in spare], device=device)
        positions = self._mask.sum(-1, keepdim=True) + torch.arange(width, device=device)
        positions = positions.clamp(max=self._positions - 1)  # behind a row's own tokens there is only padding
        logits = self._pass(self.rows, ids, torch.cat([self._mask, fresh], 1), positions, self._cache)
        kept = [self._add(row, own, g) for row, own, g in zip(self.rows, logits, drafts, strict=True)]
        for row, right, drafted in zip(self.rows, kept, drafts, strict=True):
            row.draft_length = min(2 * len(drafted), LONGEST_DRAFT) if drafted and right > len(drafted) else 0
        fresh = torch.tensor([[1] * n + [0] * (width - n) for n in kept], device=device)
        self._mask = torch.cat([self._mask, fresh], 1)
        self._leave()

    def _pass(
        self, rows: Sequence[Row], ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, *, last: bool = False
    ) -> Tensor:
        self.passes += 1
        few: dict[str, Any] = {"logits_to_keep": 1} if last and self._last_only else {}
        with self._context(rows) if self._context else nullcontext():
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **few,
            )
        logits: Tensor = output.logits
        return logits

    def _draft(self, row: Row, most: int) -> list[int]:
        if most <= 0 or not self._most or row.choose is not None:
            return []
        known, history = len(row.history), row.history
        history.add(row.new[known - len(row.prompt) :] if known else [*row.prompt, *row.new])
        return history.draft(most)

    @property
    def joins(self) -> bool:
        """Whether rows may join others: not where a layer counts columns of the cache and not positions."""
        return not self._windowed

    def _add(self, row: Row, logits: Tensor, drafted: Sequence[int]) -> int:
        """Append the tokens a row's logits [tokens, vocabulary] stand for; return how many of its inputs were right."""
        best = (row.choose(logits[0]) for _ in likeliest(logits[:1])) if row.choose else likeliest(logits)
        for right, token in enumerate(best, 1):
            row.new.append(token)
            row.ended = self._done(row)
            if row.ended or right > len(drafted) or drafted[right - 1] != token:
                return right
        return len(logits)

    def _join(self, rows: list[Row], cache: Any, mask: Tensor) -> None:
        """Put rows with their cache beside those under way, the shorter ones moved to the right."""
        if not self.rows:
            self.rows, self._cache, self._mask = rows, cache, mask
            return
        self._compact()
        width = max(self._mask.shape[1], mask.shape[1])
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            mine.keys = torch.cat([_moved(mine.keys, width), _moved(theirs.keys, width)])
            mine.values = torch.cat([_moved(mine.values, width), _moved(theirs.values, width)])
        both = [m.new_zeros(len(m), width - m.shape[1]) for m in (self._mask, mask)]
        self._mask = torch.cat([torch.cat(pair, 1) for pair in ((both[0], self._mask), (both[1], mask))])
        self.rows += rows

    def _leave(self) -> None:
        """Let the rows that are done leave, cache and all."""
        places = [i for i, row in enumerate(self.rows) if not row.ended]
        if len(places) < len(self.rows):
            index = torch.tensor(places, dtype=torch.long, device=self._mask.device)
            self.rows, self._mask = [self.rows[i] for i in places], self._mask[index]
            if places:
                self._cache.batch_select_indices(index)
        if self.rows and self._mask.shape[1] > int(self._mask.sum(-1).max()) + SLACK:
            self._compact()

    def _compact(self) -> None:
        """Take columns that a row does not use out of its cache; what it uses stays in order, at the right end."""
        if self._windowed:
            return
        width = int(self._mask.sum(-1).max())
        order = self._mask.argsort(dim=-1, stable=True)[:, -width:]
        self._mask = self._mask.gather(1, order)
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, index))


def _moved(states: Tensor, width: int) -> Tensor:
    """Return cached states [rows, heads, tokens, head_dim] with empty columns before them."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))


def windowed(model: Any) -> bool:
    """Tell whether some layers see only a window of the last tokens, by their place in the cache."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds) or bool(
        not kinds and getattr(config, "sliding_window", None)
    )


def run(decoder: Decoder, batches: Sequence[Sequence[Row]], most: int) -> Iterator[None]:
    """Decode batches of rows to their end; the next one joins as soon as there is room. Yields after every pass.

    Args:
        decoder: empty.
        batches: rows of prompts of similar length, to be started together.
        most: rows under way at a time (a batch of more starts alone).
    """
    waiting = deque(batches)
    while waiting or decoder.rows:
        room = waiting and decoder.joins and len(decoder.rows) + len(waiting[0]) <= most
        if waiting and (room or not decoder.rows):
            decoder.admit(waiting.popleft())
        else:
            decoder.advance()
        yield
