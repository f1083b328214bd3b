"""Which rows a client trains on in a round, and with what learning rate. Pure functions of the settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from fedtune.config.schema import TrainSettings
from fedtune.types import derive_seed


def learning_rate(train: TrainSettings, round_: int, rounds: int) -> float:
    """Return the round's learning rate: a cosine over rounds, constant within one (FlowerTune's template).

    The first round is already below the maximum and the last is exactly the minimum.
    """
    low, high = train.learning_rate_min, train.learning_rate_max
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * round_ / rounds))


def _permutation(size: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _repeated(size: int, batch: int, steps: int) -> list[list[int]]:
    """Return the batches Hugging Face's Trainer draws with its default seed of 42, the same every round.

    Epoch e is `torch.randperm(size)` under seed 42 + e; the last batch of an epoch may be short.
    """
    epochs = math.ceil(steps / math.ceil(size / batch))
    orders = [_permutation(size, 42 + epoch) for epoch in range(epochs)]
    return [order[i : i + batch] for order in orders for i in range(0, size, batch)][:steps]


def _stream(size: int, seed: int, client: int, start: int) -> Iterator[int]:
    """Yield a client's rows from a place in an endless sequence of fresh permutations of its shard."""
    epoch, place = divmod(start, size)
    while True:
        yield from _permutation(size, derive_seed(seed, "rows", client, epoch))[place:]
        epoch, place = epoch + 1, 0


def batches(train: TrainSettings, size: int, seed: int, client: int, round_: int) -> list[list[int]]:
    """Return the rows of each optimiser step.

    Args:
        train: `rows = "fresh"` goes on through shuffles of the shard from round to round. A client that takes part in
            every round trains on each row once an epoch; one that does not skips the rows of the rounds it missed.
            `"repeat"` gives the same rows every round, as the public template does.
        size: examples in the client's shard (at least 1).
        seed: the run's.
        client: whose rows.
        round_: when; the place depends on nothing else, so a resumed run draws the same.

    Returns:
        `max_steps` lists of indices into the shard.
    """
    batch = train.batch
    if train.rows == "repeat":
        return _repeated(size, batch, train.max_steps)
    rows = _stream(size, seed, client, (round_ - 1) * train.max_steps * batch)
    return [[next(rows) for _ in range(batch)] for _ in range(train.max_steps)]


def distinct(plan: Iterable[Iterable[int]]) -> int:
    """Return how many different rows the steps of a round have."""
    return len({row for rows in plan for row in rows})
