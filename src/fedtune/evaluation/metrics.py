"""What is common to all per-sample logs: what of them counts, when a score is withheld, means of clients. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.data.files import parse_rows, read_text_file
from fedtune.evaluation.extract import bare
from fedtune.results.schema import Score
from fedtune.results.stats import mean_interval, proportion_interval

# letters of an error that are shown beside a score that is withheld
MAX_ERROR = 300


def _answered_by(row: Mapping[str, Any], last: Mapping[str, Any], word: str) -> Mapping[str, Any]:
    """Return a sample with the output of the last one with the same prompt, which says `word` (see `bare`)."""
    # equal prompts are of one kind and have the same options
    strict = next((answer for answer in row["answers"] if answer.lower() == word), None)
    return {
        **row,
        "output": last["output"],
        "predicted": last["predicted"],
        "correct": last["predicted"] == row["gold"].lower(),
        "strict": strict == row["gold"],
        "valid": strict is not None,
    }


def as_counted(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the samples of a log as its score counts them; the log itself keeps what was generated.

    In the official evaluation of questions, items with equal prompts all get the last one's output. Such samples name
    it: `same_prompt_as` is the `i` of the last. Samples without that key (all other logs, and older ones) stay as they
    are. All that is made from a log (score, board, comparison, mean over clients) is made from these.
    """
    if not any("same_prompt_as" in row for row in rows):
        return list(rows)
    by_place = {row["i"]: row for row in rows}
    words: dict[Any, str] = {}  # each output is read once, however many samples name it
    counted = []
    for row in rows:
        place = row.get("same_prompt_as")
        last = by_place.get(place)
        # errors neither give nor take an output
        if last is None or row.get("error") or last.get("output") is None:
            counted.append(row)
            continue
        if place not in words:
            words[place] = bare(last["output"])
        counted.append(_answered_by(row, last, words[place]))
    return counted


def sample_value(row: Mapping[str, Any]) -> float:
    """Return one sample's contribution to its task's score: 0 or 1, or the value of a solution."""
    value = row.get("value")
    return float(value) if value is not None else float(bool(row["correct"]))


def trivial_score(score: Score) -> tuple[float, tuple[float, float] | None] | None:
    """Return the majority row of a score with its interval, where there is one."""
    if "majority" not in score.trivial:
        return None
    share = score.trivial["majority"]
    interval = proportion_interval(round(share * score.n), score.n)
    return share, (interval.low, interval.high) if interval else None


def withheld(rows: Sequence[Mapping[str, Any]], limit: float) -> str:
    """Say why a task has no score: no items, or a larger share of errors than `limit` (with the commonest error)."""
    found = Counter(" ".join(str(row["error"]).split()) for row in rows if row.get("error"))
    errors, n = sum(found.values()), len(rows)
    if not n or errors / n <= limit:
        return "" if n else "no items"
    [(text, count)] = found.most_common(1)
    shown = text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 1] + "…"
    often = "" if count == errors else f"{count} of them "
    return f"{errors} of {n} items raised an error, more than {limit:.1%}: {often}{shown}"


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
