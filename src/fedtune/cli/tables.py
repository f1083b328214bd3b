"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Column, Table

from fedtune.evaluation import scorers
from fedtune.evaluation.metrics import as_counted, sample_value, trivial_score
from fedtune.io import read_lines, reading
from fedtune.results.bounds import LARGEST
from fedtune.results.schema import Arm, Result, Score
from fedtune.results.stats import compare
from fedtune.types import CorruptFileError, counted


def number(value: float | None, metric: str = "accuracy") -> str:
    """Return a score for people; withheld ones as a dash."""
    return "-" if value is None else format(value, scorers.metric(metric).table)


def span(low: float, high: float, metric: str = "accuracy") -> str:
    """Return an interval for people."""
    dash = " to " if low < 0 else "–"
    return f"{number(low, metric)}{dash}{number(high, metric)}"


def _samples(path: Path) -> dict[int, float]:
    rows = read_lines(path, torn_tail=True)[1:]
    with reading(path):
        # a solution that raised has no likelihood, not even a bad one
        found = {int(r["i"]): sample_value(r) for r in as_counted(rows) if not ("value" in r and r["value"] is None)}
    if wrong := [i for i, value in found.items() if not abs(value) <= LARGEST]:
        raise CorruptFileError(f"{path}: item {wrong[0]} has a score of {found[wrong[0]]}")
    return found


def paired(first: Path, second: Path) -> tuple[list[float], list[float]]:
    """Return the scores of two per-sample logs on the items both have, in order."""
    one, two = _samples(first), _samples(second)
    shared = sorted(set(one) & set(two))
    return [one[i] for i in shared], [two[i] for i in shared]


def _delta(run: Path | None, arm: Arm, score: Score) -> str:
    """Return the gain over the base model with its paired interval."""
    if run is None or arm.name in ("base", "local-only") or score.withheld:
        return ""
    name = f"{score.task}.{score.mode}.jsonl"
    first, second = run / "evals/base" / name, run / "evals" / arm.name / name
    if not (first.exists() and second.exists()):
        return ""
    base, own = paired(first, second)
    if not own:
        return ""
    result = compare(base, own)
    mark = " *" if result.interval.low > 0 or result.interval.high < 0 else ""
    return f"{result.difference:+.3f} [{result.interval.low:+.3f}, {result.interval.high:+.3f}]{mark}"


def _spread(arm: Arm, score: Score) -> str:
    values = arm.of_clients(score)
    return f"; {counted(len(values), 'client')}, {number(min(values))} to {number(max(values))}" if values else ""


def _row(run: Path | None, arm: Arm, score: Score) -> tuple[str, ...]:
    shown = number(score.score, score.metric) if not score.withheld else "withheld"
    quality = scorers.metric(score.metric).quality_of(score)
    interval = span(*score.interval, score.metric) if score.interval else ""
    known = score.withheld or interval + _spread(arm, score)
    return arm.name, str(score.n), shown, known, _delta(run, arm, score), quality


def _majority(score: Score) -> tuple[str, ...] | None:
    found = trivial_score(score)
    if found is None:
        return None
    share, known = found
    return "always-majority", str(score.n), number(share), span(*known) if known else "", "", ""


def _table(title: str, metric: str, rows: Sequence[tuple[str, ...]]) -> Table:
    """Return a table of `_row`s; a column that would be empty is left out."""
    columns = [
        Column("model", no_wrap=True, min_width=15),
        Column("n", justify="right", no_wrap=True),
        Column("score", justify="right", no_wrap=True),
        Column("95 % interval", overflow="fold"),
        Column("gain over base, paired", overflow="fold"),
        Column(scorers.metric(metric).quality, justify="right", overflow="fold"),
    ]
    shown = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table(*(columns[i] for i in shown), title=title, title_justify="left", title_style="bold")
    table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table


def scores(arms: list[Arm], run: Path | None = None) -> list[Table]:
    """Return a table for each task and mode, with the base model, the majority class and every arm."""
    tables = []
    for task, mode in dict.fromkeys((s.task, s.mode) for a in arms for s in a.scores):
        found = [(a, s) for a in arms for s in a.scores if (s.task, s.mode) == (task, mode)]
        metric = found[0][1].metric
        rows = [_row(run, arm, score) for arm, score in found]
        trivial = _majority(found[0][1])
        rows[1:1] = [trivial] if trivial else []
        tables.append(_table(f"{task} ({mode}, {metric})", metric, rows))
    return tables


def doubts(result: Result) -> list[str]:
    """Return what a reader should know before believing the table."""
    lines = []
    if result.unranked:
        lines.extend(["unranked:", *(f"  {reason}" for reason in result.unranked)])
    if result.skipped_rounds:
        lines.append(
            f"{result.skipped_rounds} of {counted(result.rounds, 'round')} changed nothing (too few good updates)"
        )
    if result.lost_clients:
        lines.append(
            f"lost or rejected (see rounds.jsonl): {counted(result.lost_clients, 'client reply', 'client replies')}"
        )
    for arm in result.arms:
        clients = ", ".join(map(str, list(arm.failed)[:10]))
        if arm.failed:
            why = next(iter(arm.failed.values()))
            lines.append(
                f"{arm.name}: no model and no score for {counted(len(arm.failed), 'client')} ({clients}): {why}"
            )
    return lines
