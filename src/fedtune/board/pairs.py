"""Whether two recipes can be told apart: a paired bootstrap over their items and their seeds. No torch.

An item's value is the share of a recipe's seeds that had it right; a recipe's score is the mean over tasks of the mean
over items. Both recipes are drawn on the same items, and each recipe's seeds are drawn anew as well, so no seed counts
for more than another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

DRAWS = 4000
LEVEL = 0.05
FEWEST = 6  # differing items below which no exact test of signs can reach 5 %: 2 * 0.5 ** 5 is more
Flags = npt.NDArray[np.bool_]


def _patterns(one: Flags, two: Flags) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the different columns of flags (seeds x patterns, of either recipe), and how many items have each."""
    columns, counts = np.unique(np.concatenate([one, two]), axis=1, return_counts=True)
    values = columns.astype(np.float64)
    return values[: len(one)], values[len(one) :], counts


def _weights(generator: np.random.Generator, seeds: int) -> npt.NDArray[np.float64]:
    """Return each draw's share of each seed, (draws x seeds)."""
    return generator.multinomial(seeds, [1 / seeds] * seeds, DRAWS) / seeds


def _better_first(pairs: Sequence[tuple[Flags, Flags]]) -> list[tuple[Flags, Flags]]:
    """Return the pairs with the recipe of the higher score first, and of equal ones always the same."""

    def place(recipe: tuple[Flags, ...]) -> tuple[float, list[bytes]]:
        return -sum(float(flags.mean()) for flags in recipe), [flags.tobytes() for flags in recipe]

    first, second = sorted(zip(*pairs, strict=True), key=place)
    return list(zip(first, second, strict=True))


def p_value(pairs: Sequence[tuple[Flags, Flags]]) -> float:
    """Return the two-sided p of two recipes' difference in score; draws of exactly zero count half on each side.

    It does not depend on which recipe is named first, as the draws are the same.

    Args:
        pairs: for each task both recipes' flags, (seeds x items) each; the items are the same, the seeds need not be.
    """
    pairs = _better_first(pairs)
    tasks = [_patterns(one, two) for one, two in pairs]
    differing = sum(int(counts[one.mean(0) != two.mean(0)].sum()) for one, two, counts in tasks)
    if differing < FEWEST:
        return 1.0
    generator = np.random.default_rng(0)
    first, second = (_weights(generator, len(flags)) for flags in pairs[0])
    gaps = np.zeros(DRAWS)
    for one, two, counts in tasks:
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), DRAWS) / counts.sum()
        gaps += ((first @ one - second @ two) * drawn).sum(axis=1) / len(tasks)
    below = float((gaps < -1e-12).mean() + 0.5 * (np.abs(gaps) <= 1e-12).mean())
    return 2 * min(below, 1 - below)
