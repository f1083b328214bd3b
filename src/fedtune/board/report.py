"""A one-page report of a run, as Markdown or as HTML that loads nothing else."""

from __future__ import annotations

import html

from fedtune.evaluation import scorers
from fedtune.results.entry import Entry, escape_markdown
from fedtune.results.schema import Arm, Score
from fedtune.types import counted

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:1rem auto;padding:0 1rem}"
    "body{color:#1b1f24;background:#fff}"
    "table{border-collapse:collapse}td,th{border-bottom:1px solid #d0d7de;padding:.25rem .6rem;text-align:left}"
    "svg{max-width:100%;height:auto}@media(prefers-color-scheme:dark){body{color:#e6eaef;background:#0f1318}}"
)


SCORES, FACTS = ["model", "task", "n", "score", "95 % interval", "clients", "valid"], ["what", "value"]


def _title(entry: Entry) -> str:
    return f"{entry.domain}: {entry.base} with {entry.method}, seed {entry.seed}"


def _number(value: float | None, metric: str) -> str:
    return "withheld" if value is None else format(value, scorers.metric(metric).report)


def _interval(score: Score) -> str:
    return "" if score.interval is None else " to ".join(_number(v, score.metric) for v in score.interval)


def _spread(arm: Arm, score: Score) -> str:
    known = arm.of_clients(score)
    return f"{_number(min(known), score.metric)} to {_number(max(known), score.metric)}" if known else ""


def score_rows(entry: Entry) -> list[list[str]]:
    """Return the table of scores: one line for each arm and task, with the trivial rows."""
    rows = []
    for arm in entry.arms:
        for s in arm.scores:
            valid = "" if s.valid_rate is None else f"{s.valid_rate:.0%}"
            task, n, shown = s.title, str(s.n), _number(s.score, s.metric)
            rows.append([arm.name, task, n, shown, _interval(s), _spread(arm, s), valid])
            if arm is entry.arms[0] and "majority" in s.trivial:
                rows.append(["majority class", task, n, _number(s.trivial["majority"], s.metric), "", "", ""])
    return rows


def fact_rows(entry: Entry) -> list[list[str]]:
    """Return what was run, and what it took."""
    costs, shards = entry.costs, entry.data.get("clients", ())
    facts = {
        "base model": f"{entry.base}@{entry.revision}",
        "method": entry.method,
        "protocol": entry.protocol,
        "seed": str(entry.seed),
        "data": f"{entry.data.get('name')}, {entry.data.get('rows')} rows over {counted(len(shards), 'client')}",
        "examples per client": ", ".join(map(str, shards)),
        "rounds": f"{entry.rounds}"
        + (f", of which {entry.skipped_rounds} changed nothing" if entry.skipped_rounds else ""),
        "bytes up, down": f"{costs.bytes_up:,}, {costs.bytes_down:,}",
        "seconds": "" if costs.wall_seconds is None else f"{costs.wall_seconds:.0f}",
        "peak memory": "" if costs.peak_memory_bytes is None else f"{costs.peak_memory_bytes / 1024**3:.2f} GiB",
        "energy": "" if costs.energy_joules is None else f"{costs.energy_joules / 3.6e6:.4f} kWh",
        "trainable parameters": f"{costs.trainable_parameters:,}" if costs.trainable_parameters else "",
        "code": f"{entry.versions.get('fedtune')} {entry.code.get('commit') or ''}",
        "recipe": entry.config_sha256,
    }
    return [[name, value] for name, value in facts.items() if value]


def doubts(entry: Entry) -> list[str]:
    """Return what a reader should doubt before believing the table."""
    lines = [f"It is not ranked: {reason}." for reason in entry.unranked]
    if entry.lost_clients:
        lost = counted(entry.lost_clients, "client reply", "client replies")
        lines.append(f"Lost or rejected: {lost}; rounds.jsonl has the reasons.")
    if entry.skipped_rounds:
        rounds = counted(entry.rounds, "round")
        lines.append(f"{entry.skipped_rounds} of {rounds} had too few good updates and changed nothing.")
    base = entry.arm("base")
    for s in entry.main.scores:
        name, other = s.title, base.like(s) if base else None
        if s.score is None:
            lines.append(f"{name} is withheld: {s.withheld}.")
            continue
        if s.valid_rate is not None and s.valid_rate < 0.9:
            lines.append(f"{name}: only {s.valid_rate:.0%} of the answers could be read: it measures format too.")
        if other and other.score is not None and s.interval and s.interval[0] <= other.score <= s.interval[1]:
            lines.append(f"{name}: the base model's {_number(other.score, s.metric)} lies inside the interval.")
        if s.score <= s.trivial.get("majority", -1.0):
            lines.append(f"{name} is no better than always naming the majority class.")
    if entry.code.get("dirty"):
        lines.append("The code was changed since its last commit.")
    lines.append("One seed is one draw: the spread over seeds is usually larger than the interval over items.")
    return lines


def markdown(entry: Entry) -> str:
    """Return the report as Markdown."""

    def table(head: list[str], rows: list[list[str]]) -> str:
        lines = [head, ["---"] * len(head), *([escape_markdown(c) for c in row] for row in rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    losses = ", ".join("-" if v is None else f"{v:.4f}" for v in entry.losses)
    parts = [
        f"# {escape_markdown(_title(entry))}",
        table(SCORES, score_rows(entry)),
        "## What a reader should doubt\n\n" + "\n".join(f"- {escape_markdown(line)}" for line in doubts(entry)),
        f"## Training\n\nLoss by round: {losses}",
        "## What was run\n\n" + table(FACTS, fact_rows(entry)),
    ]
    return "\n\n".join(parts) + "\n"


def _curve(title: str, points: list[tuple[int, float]]) -> str:
    """Return a line plot as SVG, or a sentence where there is only one point to plot."""
    if len(points) < 2:
        return "".join(f"<p>{html.escape(title)}: {y:.4f} in round {x}</p>" for x, y in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    left, right = points[0][0], points[-1][0]

    def place(x: int, y: float) -> str:
        across = 50 + 330 * (x - left) / max(1, right - left)
        return f"{across:.1f},{150 - 110 * ((y - low) / (high - low) if high > low else 0.5):.1f}"

    said = html.escape(f"{title}: " + ", ".join(f"{x}: {y:.4f}" for x, y in points), quote=True)
    line = " ".join(place(x, y) for x, y in points)
    return (
        f'<svg viewBox="0 0 400 175" width="400" role="img" aria-label="{said}"><text x="4" y="16" fill="currentColor">'
        f'{html.escape(title)}</text><text x="2" y="44" fill="currentColor" font-size="11">{high:.3f}</text>'
        f'<text x="2" y="154" fill="currentColor" font-size="11">{low:.3f}</text>'
        f'<polyline points="{line}" fill="none" stroke="#3b82f6" stroke-width="2"/>'
        f'<text x="50" y="170" fill="currentColor" font-size="11">round {left} to {right}</text></svg>'
    )


def page(entry: Entry) -> str:
    """Return the report as one HTML page; everything in it is escaped."""

    def table(head: list[str], rows: list[list[str]]) -> str:
        top = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"

    losses = [(i, v) for i, v in enumerate(entry.losses, 1) if v is not None]
    curves = [_curve("training loss by round", losses)]
    for name in dict.fromkeys(f"{p.task} ({p.mode})" for p in entry.curve):
        points = [(p.round, p.score) for p in entry.curve if f"{p.task} ({p.mode})" == name and p.score is not None]
        curves.append(_curve(f"{name} by round", points))
    title, scores = html.escape(_title(entry)), table(SCORES, score_rows(entry))
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"<h1>{title}</h1>{scores}<h2>What a reader should doubt</h2><ul>"
        + "".join(f"<li>{html.escape(line)}</li>" for line in doubts(entry))
        + f"</ul><h2>Training</h2>{''.join(curves)}<h2>What was run</h2>{table(FACTS, fact_rows(entry))}"
        "</main></body></html>\n"
    )
