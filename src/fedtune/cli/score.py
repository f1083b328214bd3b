"""`fedtune score`: score generations that somebody published, without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.say import say


def score(
    task: Annotated[str, typer.Argument(help="A benchmark task: mmlu_stem, pubmedqa, fpb, humaneval …")],
    file: Annotated[Path, typer.Argument(help="Generations: a JSON array or JSON lines, plain or gzipped.")],
    mode: Annotated[str, typer.Option(help="official (as FlowerTune reads answers) or strict")] = "official",
    references: Annotated[Path | None, typer.Option(help="Tests of programs (default: the set's own).")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a generation file somebody published."""
    from fedtune.evaluation import published

    result, _, why = published.scored(task, file, mode, references)
    if why:
        say(f"{task}: not a score of the known set: {why}", err=True)
    if json_output:
        typer.echo(json.dumps(result.model_dump(mode="json", exclude={"withheld", "items_sha256"})))
        return
    low, high = result.interval or (float("nan"), float("nan"))
    if result.details:
        typer.echo(f"{task}: pass@1 {result.score:.4f}, 95 % interval {low:.4f} to {high:.4f}, n = {result.n}")
        typer.echo(", ".join(f"{name} {share:.3f}" for name, share in result.details.items()))
        return
    valid = "unknown" if result.valid_rate is None else f"{result.valid_rate:.1%}"
    typer.echo(f"{task} ({mode}): {result.score:.4f}, 95 % interval {low:.4f} to {high:.4f}, n = {result.n}")
    typer.echo(f"valid answers: {valid}; always the majority class: {result.trivial['majority']:.4f}")
