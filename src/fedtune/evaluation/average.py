"""One score for many clients that were evaluated each alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedtune.data.files import parse_rows, read_text_file
from fedtune.evaluation.metrics import as_counted, sample_value
from fedtune.results.schema import Score
from fedtune.results.stats import mean_interval


def _item_means(logs: Sequence[Path]) -> list[float]:
    """Return for each item its mean score over several per-sample logs."""
    # of each log no more than its values is kept: there may be hundreds
    columns = [[*map(sample_value, as_counted(parse_rows(read_text_file(log), str(log))[1:]))] for log in logs]
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


def _average(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if one is missing: a mean over the others would look better than it is."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def mean_score(scores: Sequence[Score], logs: Sequence[Path]) -> Score:
    """Return the mean over clients of one task's score.

    Args:
        scores: one a client, of the same task and mode.
        logs: their per-sample files, packed or not; the interval is over items of the clients' mean.
    """
    score = _average([s.score for s in scores])
    spread = mean_interval(_item_means(logs)) if score is not None else None
    names = sorted({name for s in scores for name in s.details})
    return scores[0].model_copy(
        update={
            "score": score,
            "interval": (spread.low, spread.high) if spread else None,
            "strict": _average([s.strict for s in scores]),
            "valid_rate": _average([s.valid_rate for s in scores]),
            "macro_f1": _average([s.macro_f1 for s in scores]),
            "errors": sum(s.errors for s in scores),
            "withheld": next((s.withheld for s in scores if s.withheld), ""),
            "details": {n: sum(s.details.get(n, 0.0) for s in scores) / len(scores) for n in names},
        }
    )
