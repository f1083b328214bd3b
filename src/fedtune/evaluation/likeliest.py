"""The likeliest token, which only logits that are numbers have: a NaN would count as the largest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

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
