"""`fedtune eval` and `fedtune compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from fedtune.cli.errors import check_withheld
from fedtune.types import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from rich.table import Table

    from fedtune.results.stats import Paired


def _modes(mode: str) -> list[str]:
    from fedtune.config.schema import Mode

    words = sorted(get_args(Mode))
    if mode not in ("both", *words):
        raise ConfigError("command line", [Problem(f"--mode {mode}", "unknown mode", "official, likelihood or both")])
    return words if mode == "both" else [mode]


# what an evaluation depends on; the rest is about training
SECTIONS = ("domain", "protocol", "model", "data.source", "data.path", "prompt", "eval")
OF_RUNS = ("eval.base", "eval.every")


def evaluate(
    target: Annotated[str, typer.Argument(metavar="ADAPTER|MODEL", help="A PEFT folder, or a model's name.")],
    domain: Annotated[str, typer.Option(help="The domain: fedtune ls domains")],
    task: Annotated[list[str] | None, typer.Option(help="A task, again for more: fedtune ls tasks")] = None,
    mode: Annotated[str, typer.Option(help="official, likelihood or both")] = "both",
    limit: Annotated[int, typer.Option(help="Items per task (a seeded sample); 0 is all.")] = 0,
    data: Annotated[Path | None, typer.Option(help="A folder with eval/<domain>/ files.")] = None,
    prompt: Annotated[str | None, typer.Option(help="For likelihood: training, official or chat.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The adapter's base model, in place of the one its folder names.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the per-sample logs.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", "-s", help="Any setting.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Evaluate an adapter or a base model; run again, it does only what is missing."""
    from fedtune.cli.settings import taken
    from fedtune.cli.tables import scores as table
    from fedtune.experiment import evaluate as work
    from fedtune.experiment.progress import TerminalReporter, terminal
    from fedtune.results import schema
    from fedtune.settings import nested, resolve

    name, adapter = work.base_of(target, base)
    own = taken(settings, SECTIONS, "an evaluation", OF_RUNS)
    items = {"modes": _modes(mode), "tasks": task or [], "limit": limit, "official_limit": 0}
    asked = nested(domain=domain, model=name, eval={**items, **({"prompt": prompt} if prompt else {})})
    config = resolve(None, [asked, *own], data).config
    folder = out or work.default_folder(target, config)
    console = terminal(errors=json_output)
    found = work.evaluate(config, adapter, folder, TerminalReporter(console), insist=base is not None)
    if json_output:
        typer.echo(json.dumps([s.model_dump(mode="json") for s in found], indent=1))
    # a folder's name is no arm's: it may have blanks, and is only shown
    for each in table([schema.Arm.model_construct(name=Path(target).name, scores=found)]):
        console.print(each)
    console.print(f"per-sample logs: {folder.resolve()}", soft_wrap=True)
    check_withheld(schema.withheld(found), len(found))


def compare(
    first: Annotated[Path, typer.Argument(help="A run folder.")],
    second: Annotated[Path, typer.Argument(help="Another run folder.")],
    arm: Annotated[
        str, typer.Option(help="Which model of both: federated, base, local-only or centralised.")
    ] = "federated",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two runs on the items both were evaluated on: paired bootstrap, and McNemar's exact test."""
    from fedtune.cli.tables import paired
    from fedtune.experiment.progress import terminal
    from fedtune.results.stats import compare as test

    for run in (first, second):
        if not run.is_dir():
            raise DataError(f"{run}: no such run folder")
    pairs = [(log, second / "evals" / arm / log.name) for log in sorted((first / "evals" / arm).glob("*.jsonl"))]
    shared = {one.stem: paired(one, two) for one, two in pairs if two.exists() and _same_items(one, two)}
    results = {name: test(*scores) for name, scores in shared.items() if scores[0]}
    if not results:
        raise DataError(f"{first} and {second} have no evaluation of {arm!r} on the same items")
    if json_output:
        typer.echo(json.dumps({n: asdict(r) for n, r in results.items()}, indent=1))
        return
    terminal().print(_compared(results))
    typer.echo("gain: second minus first; won, lost: items that only the second, only the first got right")
    typer.echo("p: McNemar's exact test, or of the bootstrap where a score is not right or wrong")


def _compared(results: Mapping[str, Paired]) -> Table:
    """Return comparisons as a table that fits 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(*("evaluation", "n", "gain", "95 % interval", "won", "lost", "p"), box=box.SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    for name, r in results.items():
        span = f"{r.interval.low:+.3f} to {r.interval.high:+.3f}"
        won, lost = ("-" if n is None else str(n) for n in (r.only_second, r.only_first))
        table.add_row(name, str(r.n), f"{r.difference:+.3f}", span, won, lost, f"{r.p:.3g}")
    return table


def _same_items(first: Path, second: Path) -> bool:
    from fedtune.io import read_lines, reading

    heads = [read_lines(p, torn_tail=True)[:1] for p in (first, second)]
    with reading(f"{first} or {second}"):
        return bool(heads[0]) and bool(heads[1]) and heads[0][0]["items"] == heads[1][0]["items"]
