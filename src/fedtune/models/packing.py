"""How several texts are packed into one unpadded row, and how attention over it is cut into dense batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MIN_PREFIX = 8
# what one more call of an attention kernel costs, in pairs of a query and a key that could be computed instead
CALL = {"cpu": 8192, "cuda": 2**20}


@dataclass(frozen=True)
class Span:
    """One text's own tokens [start, end) of a row; it also sees the tokens of `prefix` [start, end) before them."""

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)

    @property
    def length(self) -> int:
        """Tokens of its own."""
        return self.end - self.start

    @property
    def before(self) -> int:
        """Tokens of the prefix."""
        return self.prefix[1] - self.prefix[0]

    def moved(self, by: int) -> Span:
        """Return the same span further on in a row."""
        return Span(self.start + by, self.end + by, (self.prefix[0] + by, self.prefix[1] + by))


@dataclass(frozen=True)
class PackedRow:
    """Several texts as one row.

    Attributes:
        ids, positions: of each token in the row.
        spans: which tokens belong together, in the order they stand; a shared prefix is a span of its own.
        place: position in the texts joined end to end -> position in the row.
    """

    ids: list[int]
    positions: list[int]
    spans: tuple[Span, ...]
    place: list[int]

    def index(self, keep: Sequence[int], device: torch.device) -> Tensor:
        """Return the positions in the row of some in the texts joined."""
        return torch.tensor([self.place[i] for i in keep], dtype=torch.long, device=device)


def common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Return the length of the shared prefix of all texts, leaving each at least one token of its own."""
    shortest = min(map(len, texts)) - 1
    return next((i for i in range(shortest) if len({t[i] for t in texts}) > 1), max(shortest, 0))


def pack(texts: Sequence[Sequence[int]], *, share_prefix: bool = False) -> PackedRow:
    """Lay texts out in one row.

    Args:
        texts: token ids, each at least one.
        share_prefix: compute the shared prefix only once. Exact, gradients included, as long as
            nothing random (dropout) tells the copies apart.
    """
    common = common_prefix(texts) if share_prefix and len(texts) > 1 else 0
    prefix = common if common >= MIN_PREFIX else 0
    ids, positions = list(texts[0][:prefix]), list(range(prefix))
    spans = [Span(0, prefix)] if prefix else []
    place: list[int] = []
    for text in texts:
        place += range(prefix)
        place += range(len(ids), len(ids) + len(text) - prefix)
        spans.append(Span(len(ids), len(ids) + len(text) - prefix, (0, prefix)))
        ids += text[prefix:]
        positions += range(prefix, len(text))
    return PackedRow(ids, positions, tuple(spans), place)


def join(rows: Sequence[PackedRow]) -> PackedRow:
    """Lay rows end to end; nothing of one sees anything of another."""
    offsets = [0, *accumulate(len(r.ids) for r in rows)]
    return PackedRow(
        [i for r in rows for i in r.ids],
        [p for r in rows for p in r.positions],
        tuple(s.moved(by) for r, by in zip(rows, offsets, strict=False) for s in r.spans),
        [p + by for r, by in zip(rows, offsets, strict=False) for p in r.place],
    )


def runs(items: Iterable[T], tokens: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Group neighbours into runs of at most `limit` tokens; a longer one stands alone."""
    run: list[T] = []
    left = limit
    for item in items:
        size = tokens(item)
        if run and size > left:
            yield run
            run, left = [], limit
        run.append(item)
        left -= size
    if run:
        yield run


@dataclass(frozen=True)
class Batch:
    """Texts that attend together, of `length` each, padding included.

    Attributes:
        count: texts.
        length: tokens of the longest.
        before: tokens of the shared prefix that they see as well.
        behind: place of the batch that is this prefix, one text alone; None without one.
    """

    count: int
    length: int
    before: int = 0
    behind: int | None = None


def batches(spans: Sequence[Span], call: int) -> list[list[Span]]:
    """Group a row's spans of the same prefix whose padding to the longest costs less than `call`, as in `CALL`."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.prefix, -s.length, s.start)):
        first = groups[-1][0] if groups else None
        wasted = (first.length - span.length) * (first.length + span.length + span.before) if first else 0
        if first is not None and wasted <= call and first.prefix == span.prefix:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


@dataclass(frozen=True)
class Ragged:
    """Cumulative lengths of a row's texts, int32 [texts + 1], and the tokens that are keys (None: all, in order)."""

    queries: Tensor
    keys: Tensor
    tokens: Tensor | None
    longest: tuple[int, int]


class PackingPlan:
    """How a row's tokens are arranged for attention; made once a pass and used by every layer.

    Attributes:
        batches: what attends together.
        sizes: arranged places of each batch.
        there: arranged place -> token of the row; where padding stands, the first of the same text. None: as they are.
        back: token of the row -> arranged place.
        pads: arranged places where padding stands; None without any.
        spans: the row's.

    Args:
        spans: at least one, without gaps.
        device: where the indices are.
        together: all in one batch, in the order they stand, whatever padding that takes.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, *, together: bool = False) -> None:
        self.spans = tuple(spans)
        self.batches: list[Batch] = []
        there: list[int] = []
        pads: list[int] = []
        places: dict[int, int] = {}
        back = [0] * spans[-1].end
        call = CALL.get(device.type, CALL["cuda"])
        for group in [list(spans)] if together else batches(spans, call):
            length, before = max(span.length for span in group), group[0].before
            places[group[0].start] = len(self.batches)
            # a prefix stands before all that see it, so its batch is known by now
            behind = places[group[0].prefix[0]] if before else None
            self.batches.append(Batch(len(group), length, before, behind))
            for span in group:
                back[span.start : span.end] = range(len(there), len(there) + span.length)
                there += range(span.start, span.end)
                pads += range(len(there), len(there) + length - span.length)
                there += [span.start] * (length - span.length)
        self.sizes = [batch.count * batch.length for batch in self.batches]
        straight = there == list(range(len(back)))
        self.there = None if straight else torch.tensor(there, device=device)
        self.back = None if straight else torch.tensor(back, device=device)
        self.pads = torch.tensor(pads, device=device) if pads else None
        self._device = device
        self._masks: dict[Any, Tensor] = {}

    def mask(self, batch: Batch, window: int | None) -> Tensor | None:
        """Return which keys each query of a batch sees, as bool [length, before + length]; None for plain causal.

        Padding stands behind every token of its text, so a causal mask hides it from them.
        """
        length, before = batch.length, batch.before
        if before == 0 and (window is None or length <= window):
            return None
        if (length, before, window) not in self._masks:
            place = torch.arange(before, before + length, device=self._device)[:, None]
            key = torch.arange(before + length, device=self._device)[None]
            seen = key <= place
            self._masks[length, before, window] = seen if window is None else seen & (key > place - window)
        return self._masks[length, before, window]

    @cached_property
    def ragged(self) -> Ragged:
        """The same row for a kernel that takes texts of different lengths end to end."""
        own, seen = [s.length for s in self.spans], [s.before + s.length for s in self.spans]
        queries, keys = (torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=self._device) for n in (own, seen))
        tokens = [i for s in self.spans for i in (*range(*s.prefix), *range(s.start, s.end))]
        index = None if own == seen else torch.tensor(tokens, device=self._device)
        return Ragged(queries, keys, index, (max(own), max(seen)))
