"""`fedtune score`: score generations that somebody published, without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.say import say


def score(
    task: Annotated[str, typer.Argument(help="A benchmark task, such as mmlu_stem or fpb: fedtune ls tasks")],
    file: Annotated[Path, typer.Argument(help="Generations: a JSON array or JSON lines, plain or gzipped.")],
    mode: Annotated[str, typer.Option(help="official (as FlowerTune reads answers) or strict")] = "official",
    references: Annotated[Path | None, typer.Option(help="Tests of programs (default: the set's own).")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a generation file somebody published."""
    from fedtune.evaluation import published, scorers

    result, _, why = published.scored(task, file, mode, references)
    if why:
        say(f"{task}: not a score of the known set: {why}", err=True)
    if json_output:
        typer.echo(json.dumps(result.model_dump(mode="json", exclude={"withheld", "items_sha256"})))
        return
    metric = scorers.metric(result.metric)
    if result.score is None:
        say(f"{task} ({mode}, {metric.name}): withheld: {result.withheld}")
    else:
        low, high = result.interval or (float("nan"), float("nan"))
        shown = f"{result.score:.4f}, 95 % interval {low:.4f} to {high:.4f}, n = {result.n}"
        say(f"{task} ({mode}, {metric.name}): {shown}")
    say(metric.notes(result))
