"""Finance: sentiment of news and tweets."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedtune.data.hub import HubSet
from fedtune.data.packages import VADER, read_nested_tar
from fedtune.domains.base import SENTIMENTS, Domain, Item, Row, Task, TrainingSet, sentiment
from fedtune.domains.rows import label, number, place, text

_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATINGS = "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
_ECONOMIC = re.compile(
    r"\b(tax|budget|deficit|bank|econom|job|wage|debt|financ|market|invest|stock|mortgage|dollar|billion|fed"
    r"|bond|credit|price|trade)",
    re.IGNORECASE,
)
_ASK = "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."


def benchmark_split(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the benchmark's test quarter: what `datasets` does for `train_test_split(0.25, seed=42)`."""
    import math

    import numpy as np

    order = np.random.default_rng(42).permutation(len(rows))
    return [rows[i] for i in order[: math.ceil(0.25 * len(rows))]]


def _fpb(row: Row) -> Item:
    return sentiment(text(row, "sentence"), label(row, "label", 0, 2), "news")


def _fiqa(row: Row) -> Item:
    score = number(row, "sentiment_score")
    if not -1 <= score <= 1:
        raise ValueError(f"'sentiment_score' is {score}, not between -1 and 1")
    gold = 0 if score < -0.1 else 1 if score < 0.1 else 2
    noun = ("tweet", "news")[place(row, "format", ("post", "headline"))]
    return sentiment(text(row, "sentence"), gold, noun)


def _tfns(row: Row) -> Item:
    # bearish, bullish, neutral
    return sentiment(text(row, "text"), (0, 2, 1)[label(row, "label", 0, 2)], "tweet")


def _nyt(*, economic: bool) -> Sequence[Row]:
    """Return those of 5,190 New York Times editorial sentences that are about the economy, or all others.

    Each has its mean human rating (Hutto, Gilbert 2014).

    A rating in [-4, 4] below -0.5 is negative, above 0.5 positive, else neutral.
    """
    ratings = read_nested_tar(VADER, _ARCHIVE, _RATINGS).decode("utf-8", "replace")
    rows: list[Row] = []
    for line in ratings.splitlines():
        _, rating, sentence = line.split("\t", 2)
        mood = SENTIMENTS[0 if float(rating) < -0.5 else 2 if float(rating) > 0.5 else 1]
        is_economic = bool(_ECONOMIC.search(sentence))
        if is_economic is economic:
            rows.append({"instruction": _ASK, "input": sentence, "output": mood, "economic": is_economic})
    return rows


def _rated(row: Row) -> Item:
    return sentiment(text(row, "input"), place(row, "output", SENTIMENTS), "news")


_FPB = HubSet("takala/financial_phrasebank", "train", "sentences_50agree", "refs/convert/parquet")
_FIQA = tuple(HubSet("pauri32/fiqa-2018", split) for split in ("train", "validation", "test"))
_TFNS = HubSet("zeroshot/twitter-financial-news-sentiment", "validation")

FINANCE = Domain(
    name="finance",
    title="Finance",
    training=TrainingSet("fingpt-sentiment-train", HubSet("flwrlabs/fingpt-sentiment-train", "train"), group="output"),
    packaged=TrainingSet("nyt-noneconomic-sentiment", packaged=lambda: _nyt(economic=False), group="output"),
    group="output",
    tasks=(
        Task("fpb", "sentiment", _fpb, (_FPB,), "fpb_test", select=benchmark_split, n=1212),
        Task("fiqa", "sentiment", _fiqa, _FIQA, "fiqa_test", select=benchmark_split, n=304),
        Task("tfns", "sentiment", _tfns, (_TFNS,), "tfns_validation", n=2388),
    ),
    packaged_tasks=(
        Task("nyt-econ-sentiment", "sentiment", _rated, packaged=lambda: _nyt(economic=True), n=471, max_new_tokens=16),
    ),
)
