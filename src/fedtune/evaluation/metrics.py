"""From a per-sample log to a score with its interval, its trivial neighbours and its doubts. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.domains.base import Kind
from fedtune.evaluation.extract import bare
from fedtune.results.schema import Score
from fedtune.results.stats import Interval, macro_f1, mean_interval, proportion_interval

# letters of an error that are shown beside a score that is withheld
MAX_ERROR = 300


def _pair(interval: Interval | None) -> tuple[float, float] | None:
    return (interval.low, interval.high) if interval else None


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


def trivial(gold: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy of the majority class and of always giving each answer."""
    counts = Counter(gold)
    n = len(gold)
    always = {f"always-{a}": counts[a] / n for a in answers} if n else {}
    return {"majority": max(always.values(), default=0.0), **always}


def trivial_score(score: Score) -> tuple[float, tuple[float, float] | None] | None:
    """Return the majority row of a score with its interval, where there is one."""
    if "majority" not in score.trivial:
        return None
    share = score.trivial["majority"]
    return share, _pair(proportion_interval(round(share * score.n), score.n))


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


def summarise(
    task: str,
    mode: str,
    kind: Kind,
    rows: Sequence[Mapping[str, Any]],
    max_error_rate: float = 0.01,
    items: str = "",
) -> Score:
    """Score a task from its per-sample rows.

    Args:
        task, mode, kind: what was evaluated.
        rows: one a sample: gold, predicted, correct, valid, strict, error; `value` for solutions.
        max_error_rate: above this share of errors the score is withheld; of solutions, at the first error.
        items: hash of the items.
    """
    n = len(rows)
    errors = sum(bool(r.get("error")) for r in rows)
    # an item that raised can count as wrong, but not as any likelihood
    why = withheld(rows, 0.0 if kind == "solution" else max_error_rate)
    if kind == "solution":
        values = [float(r["value"]) for r in rows if r.get("value") is not None]
        mean = sum(values) / len(values) if values and not why else None
        return Score(
            task=task,
            mode=mode,
            metric="nats_per_token",
            n=n,
            score=mean,
            interval=_pair(mean_interval(values)) if mean is not None else None,
            errors=errors,
            withheld=why,
            items_sha256=items,
        )
    gold = [str(r["gold"]) for r in rows]
    right = sum(bool(r["correct"]) for r in rows)
    known = [r["valid"] for r in rows if r.get("valid") is not None]
    return Score(
        task=task,
        mode=mode,
        n=n,
        score=None if why else right / n,
        interval=None if why else _pair(proportion_interval(right, n)),
        strict=sum(bool(r["strict"]) for r in rows) / n if known and n else None,
        valid_rate=sum(map(bool, known)) / len(known) if known else None,
        macro_f1=macro_f1(gold, [str(r["predicted"]) for r in rows]) if kind == "sentiment" and n else None,
        errors=errors,
        withheld=why,
        trivial=trivial(gold, sorted({a for r in rows for a in r.get("answers", ())} | set(gold))),
        items_sha256=items,
    )
