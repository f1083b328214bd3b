"""`fedtune data`: a domain's training rows, and how they are split over the clients."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.say import say
from fedtune.types import ConfigError, Problem, counted

# what training rows and their split depend on
SECTIONS = ("domain", "protocol", "data", "federation.clients")
PLOTS = (".svg", ".png", ".pdf")


def _check_plot(path: Path) -> None:
    """Raise ConfigError for a plot that could not be written, before any work is done for it."""
    if path.suffix.lower() not in PLOTS:
        fix = f"it ends in {', '.join(PLOTS)}"
        raise ConfigError("command line", [Problem(f"--plot {path}", "is no plot's name", fix)])
    if path.is_dir():
        raise ConfigError("command line", [Problem(f"--plot {path}", "is a folder", "name a file")])


def _plot(counts: list[dict[str, int]], path: Path, title: str) -> None:
    """Draw rows per client, stacked by the partition column's values, in the format of the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fedtune.io import write_bytes

    keys = sorted({k for c in counts for k in c})
    figure, axes = plt.subplots(figsize=(max(6, len(counts) * 0.35), 4))
    bottom = [0] * len(counts)
    for key in keys:
        heights = [c.get(key, 0) for c in counts]
        axes.bar(range(len(counts)), heights, bottom=bottom, label=key or "rows")
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(xlabel="client", ylabel="rows", title=title)
    if 1 < len(keys) <= 12:
        axes.legend(fontsize=8)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.lower().removeprefix("."))
    write_bytes(path, drawn.getvalue())


def _shares(counts: list[dict[str, int]]) -> None:
    """Print rows per client as a table with bars, by the partition column's values where they are few."""
    from rich.table import Table

    from fedtune.experiment.progress import terminal

    keys = sorted({k for c in counts for k in c})
    shown = keys if len(keys) <= 6 else []
    table = Table("client", "rows", *(k or "all" for k in shown), "share", header_style="bold")
    most = max(sum(c.values()) for c in counts) or 1
    for client, count in enumerate(counts):
        total = sum(count.values())
        bar = "█" * round(24 * total / most) or "·"
        table.add_row(str(client), str(total), *(str(count.get(k, 0)) for k in shown), bar)
    terminal().print(table)


def data(
    domain: Annotated[str, typer.Argument(help="The domain: fedtune ls domains")],
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:0.3, natural …: fedtune ls partitions")] = None,
    clients: Annotated[int | None, typer.Option(help="Clients (partitions).")] = None,
    protocol: Annotated[str | None, typer.Option(help="Frozen settings.")] = None,
    folder: Annotated[Path | None, typer.Option("--data", help="A folder with train/ files.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", "-s", help="Any setting.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a .svg, .png or .pdf file.")] = None,
) -> None:
    """Show a domain's training rows: what is wrong with them, and how they are split over the clients."""
    from fedtune.cli.settings import taken
    from fedtune.data.partition import table
    from fedtune.settings import nested, resolve
    from fedtune.training import workload

    if plot:
        _check_plot(plot)
    chosen = nested(domain=domain, partition=partition, clients=clients, protocol=protocol)
    own = taken(settings, SECTIONS, "training rows and their split")
    config = resolve(None, [chosen, *own], folder).config
    loaded = workload.load(config)
    counts = table(loaded.checked.rows, loaded.shards)
    say(f"{loaded.name}: {counted(len(loaded.checked.rows), 'row')}, partition {config.data.partition}")
    _shares(counts)
    for line in loaded.checked.lines():
        say(line)
    if plot:
        _plot(counts, plot, f"{loaded.name}, {config.data.partition}")
        say(f"plot: {plot}")
