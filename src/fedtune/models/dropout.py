"""Counter-based dropout: a mask does not depend on what else is in the batch.

A token's mask is a hash of (seed, client, round, step, example, position, layer): the same alone, in any micro-batch,
in any cohort of clients, on any device. Masks of a generator would depend on who drew before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedtune.types import ModelError

_MIX = (-4658895280553007687, -7723592293110705685)  # the multipliers of splitmix64, as signed numbers
_LOW, _ROOM = (1 << 31) - 1, (1 << 62) - 1


@dataclass
class Keys:
    """The keys of the tokens in the pass that is under way [tokens], or None where nothing is dropped."""

    tokens: Tensor | None = None
    _columns: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def of(self, tokens: Tensor | None) -> Iterator[None]:
        """Set the keys for one forward and backward pass (layers may be recomputed in the second)."""
        self.tokens = tokens
        try:
            yield
        finally:
            self.tokens = None

    def columns(self, number: int, width: int, device: torch.device) -> Tensor:
        """Return a layer's odd random multipliers [width]."""
        key = (number, width, device)
        if key not in self._columns:
            generator = torch.Generator().manual_seed(number)
            drawn = torch.randint(-(2**62), 2**62, (width,), generator=generator)
            self._columns[key] = (drawn * 2 + 1).to(device)
        return self._columns[key]


def _mixed(x: Tensor) -> Tensor:
    """Return a hash of each 64-bit number (the finaliser of splitmix64; products wrap)."""
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def token_keys(
    bases: Sequence[int], firsts: Sequence[int], lengths: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Return a key for each token of a row, int64 [tokens].

    Args:
        bases: of each client's step, any 63 bits.
        firsts: the place in its step of each client's first example here.
        lengths: tokens of each client's examples, in the order they stand in the row.
        device: where.
    """
    starts, places = [], []
    for base, first, own in zip(bases, firsts, lengths, strict=True):
        for number, length in enumerate(own, first):
            starts.append(torch.full((length,), (base & _ROOM) + (number << 32)))
            places.append(torch.arange(length))
    return _mixed(_mixed(torch.cat(starts)) + torch.cat(places)).to(device)


class KeyedDropout(nn.Module):
    """Dropout by the tokens' keys; outside a keyed pass, and in evaluation, it changes nothing.

    Args:
        p: probability that a number is dropped.
        number: of the layer.
        keys: shared by all layers of a model.
    """

    def __init__(self, p: float, number: int, keys: Keys) -> None:
        super().__init__()
        self.p = p
        self.number = number
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        """Return x [1, tokens, width] with numbers dropped and the rest scaled up by 1 / (1 - p)."""
        if not self.training or self.keys.tokens is None:
            return x
        if x.shape[-2] != len(self.keys.tokens) or x.numel() != x.shape[-1] * x.shape[-2]:
            raise ModelError(
                f"lora.dropout cannot be drawn in a layer that does not see the tokens as they stand: it was given "
                f"{tuple(x.shape)} for {len(self.keys.tokens)} tokens; set lora.dropout = 0, or leave the layer out of "
                "lora.target_modules"
            )
        columns = self.keys.columns(self.number, x.shape[-1], x.device)
        drawn = _mixed(self.keys.tokens[:, None] * columns) & _LOW
        kept = drawn >= int(self.p * (_LOW + 1))
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))
