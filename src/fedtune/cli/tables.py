"""Results as tables for people."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from fedtune.evaluation.metrics import trivial_score
from fedtune.io import read_lines
from fedtune.results.schema import Arm, Result, Score
from fedtune.results.stats import compare


def number(value: float | None, metric: str = "accuracy") -> str:
    """Return a score for people; withheld ones as a dash."""
    return "-" if value is None else f"{value:.4f}" if metric != "accuracy" else f"{value:.3f}"


def interval(score: Score) -> str:
    """Return a 95 % interval for people."""
    if score.interval is None:
        return ""
    low, high = score.interval
    return f"{number(low, score.metric)} to {number(high, score.metric)}"


def _samples(path: Path) -> dict[int, float]:
    rows = read_lines(path, torn_tail=True)[1:]
    return {r["i"]: float(r["value"]) if r.get("value") is not None else float(r["correct"]) for r in rows}


def paired(first: Path, second: Path) -> tuple[list[float], list[float]]:
    """Return the scores of two per-sample logs on the items both have, in order."""
    one, two = _samples(first), _samples(second)
    shared = sorted(set(one) & set(two))
    return [one[i] for i in shared], [two[i] for i in shared]


def _delta(run: Path | None, arm: Arm, score: Score) -> str:
    """Return the gain over the base model with its paired interval."""
    if run is None or arm.name in ("base", "local-only"):
        return ""
    name = f"{score.task}.{score.mode}.jsonl"
    first, second = run / "evals/base" / name, run / "evals" / arm.name / name
    if not (first.exists() and second.exists()):
        return ""
    result = compare(*paired(first, second))
    mark = " *" if result.interval.low > 0 or result.interval.high < 0 else ""
    return f"{result.difference:+.3f} ({result.interval.low:+.3f} to {result.interval.high:+.3f}){mark}"


def _spread(arm: Arm, score: Score) -> str:
    values = [v for v in arm.per_client.get(f"{score.task}/{score.mode}", []) if v is not None]
    return f"{len(values)} clients, {number(min(values))} to {number(max(values))}" if values else ""


def scores(arms: list[Arm], run: Path | None = None) -> Table:
    """Return the table of a run: each task and mode with base, majority and every arm."""
    table = Table(title=None, header_style="bold")
    for name, right in (("task", False), ("mode", False), ("model", False), ("n", True), ("score", True)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for name in ("95 % interval", "gain over base (paired)", "valid"):
        table.add_column(name)
    keys = list(dict.fromkeys((s.task, s.mode) for a in arms for s in a.scores))
    for key in keys:
        for arm in arms:
            for score in (s for s in arm.scores if (s.task, s.mode) == key):
                valid = "" if score.valid_rate is None else f"{score.valid_rate:.0%}"
                span = _spread(arm, score) if arm.name == "local-only" else interval(score)
                shown = number(score.score, score.metric) if not score.withheld else f"withheld: {score.withheld}"
                table.add_row(*key, arm.name, str(score.n), shown, span, _delta(run, arm, score), valid)
            if arm is arms[0]:
                _majority(table, key, arm)
        table.add_section()
    return table


def _majority(table: Table, key: tuple[str, str], arm: Arm) -> None:
    for score in (s for s in arm.scores if (s.task, s.mode) == key):
        if found := trivial_score(score):
            share, span = found
            shown = f"{number(span[0])} to {number(span[1])}" if span else ""
            table.add_row(*key, "always-majority", str(score.n), number(share), shown, "", "")


def doubts(result: Result) -> list[str]:
    """Return what a reader should know before believing the table."""
    lines = []
    if result.unranked:
        lines.append("unranked: " + "; ".join(result.unranked))
    if result.skipped_rounds:
        lines.append(f"{result.skipped_rounds} of {result.rounds} rounds changed nothing (too few good updates)")
    if result.lost_clients:
        lines.append(f"{result.lost_clients} client replies were lost or rejected (rounds.jsonl)")
    return lines
