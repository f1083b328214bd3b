"""`fedtune sweep`: several runs by one command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.errors import check_withheld
from fedtune.types import ConfigError, Problem, counted

if TYPE_CHECKING:
    from fedtune.config import Settings

Setting = Annotated[list[str] | None, typer.Option("--set", "-s", help="A setting of every run: -s train.max_steps=10")]
Grid = Annotated[list[str] | None, typer.Option("--grid", "-g", help="Values to cross: -g lora.r=4;8;16")]


def _seeds(text: str) -> list[int]:
    from fedtune.cli.settings import words

    try:
        return [int(part) for part in words(text)]
    except ValueError as err:
        raise ConfigError("command line", [Problem(f"--seeds {text}", "not whole numbers", "42,43,44")]) from err


def _grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read `key=a;b;c`; each value is read as that of `--set` is."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if not values or not key:
            raise ConfigError("command line", [Problem(f"--grid {text}", "not key=value;value", "lora.r=4;8")])
        axes[key] = values.split(";")
    return axes


def sweep(
    wanted: Annotated[list[str], typer.Argument(metavar="DOMAINS", help="One or more: fedtune ls domains")],
    out: Annotated[Path, typer.Option(help="The sweep's folder; the same command continues an interrupted sweep.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A TOML file of settings.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Frozen settings: fedtune ls protocols")] = None,
    model: Annotated[str | None, typer.Option(help="A zoo name, Hub id or local folder.")] = None,
    methods: Annotated[str, typer.Option(help="A comma list, or all: fedtune ls methods")] = "fedit",
    seeds: Annotated[str, typer.Option(help="A comma list.")] = "42",
    data: Annotated[Path | None, typer.Option(help="A folder with train/ and eval/<domain>/ files.")] = None,
    settings: Setting = None,
    grid: Grid = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print sweep.json at the end.")] = False,
) -> None:
    """Run every combination of domains, methods, seeds and --grid values, sharing one base model in memory."""
    from fedtune.cli.settings import given, words
    from fedtune.experiment.progress import TerminalReporter, terminal
    from fedtune.experiment.sweep import points
    from fedtune.experiment.sweep import sweep as execute
    from fedtune.methods import METHODS
    from fedtune.settings import nested, resolve

    names = list(METHODS) if methods == "all" else words(methods)
    axes: dict[str, Sequence[Any]] = {"domain": wanted, "method": names, **_grid(grid or []), "seed": _seeds(seeds)}

    def build(where: Mapping[str, Any]) -> Settings:
        own = {k: where[k] for k in ("domain", "method", "seed")}
        crossed = [f"{k}={v}" for k, v in where.items() if k not in own]
        layers = [nested(protocol=protocol, model=model, **own), *given(settings), *given(crossed)]
        return resolve(config, layers, data)

    chosen = points(axes, build, out)
    console = terminal(errors=json_output)
    console.print(f"{counted(len(chosen), 'run')}: " + " x ".join(_axis(k, v) for k, v in axes.items()))
    rows = execute(chosen, out, TerminalReporter(console))
    if json_output:
        typer.echo(json.dumps(rows, indent=1))
    console.print(_table(rows, axes))
    console.print(f"sweep folder: {out.resolve()}", soft_wrap=True)
    reasons = {name: why for row in rows for name, why in row["withheld"].items()}
    check_withheld(reasons, sum(row["asked"] for row in rows))


def _axis(name: str, values: Sequence[Any]) -> str:
    """Return how many values of an axis are crossed: `3 seeds`, `2 values of lora.r`."""
    return f"{counted(len(values), 'value')} of {name}" if "." in name else counted(len(values), name)


def _table(rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]) -> Any:
    """Return the summary as a table: axes that vary, then mean and 95 % interval of each score."""
    from rich.table import Table

    from fedtune.experiment.progress import size

    shown = [k for k, values in axes.items() if k != "seed" and len(values) > 1] or ["method"]
    scores = list(dict.fromkeys(key for row in rows for key in row["scores"]))
    table = Table(*shown, *scores, "seeds", "on the wire", title="mean ± 95 % interval over seeds")
    for row in rows:
        cells = [_cell(row["scores"].get(key)) for key in scores]
        where = [str(row["where"][key]) for key in shown]
        table.add_row(*where, *cells, str(len(row["seeds"])), size(row["bytes"]))
    return table


def _cell(found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return ""
    half = found["half"]
    return f"{found['mean']:.3f}" + ("" if half is None else f" ± {half:.3f}")
