"""`fedtune ls`: what there is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

import fedtune
from fedtune.types import ConfigError, Problem, nearest

if TYPE_CHECKING:
    from fedtune.methods import Method

Rows = list[dict[str, Any]]


def _models() -> Rows:
    from fedtune.models.zoo import zoo

    return [
        {
            "model": m.id,
            "size": f"{m.parameters / 1000:.2f} B" if m.parameters >= 1000 else f"{m.parameters:.0f} M",
            "licence": m.licence + (" (gated)" if m.gated else ""),
            "LoRA targets": ",".join(m.targets),
            "template": m.template,
            "pinned": m.revision.removeprefix("sha256:")[:8] or "no",
            "known issues": m.known_issues,
        }
        for m in zoo().values()
    ]


def _traffic(kind: type[Method]) -> dict[str, str]:
    """Return a method's bytes up and down relative to FedIT's: Mistral-7B, q and v, rank 32, 10 clients a round."""
    from fedtune.methods.state import Sizes

    rank, clients = 32, 10
    sizes = [Sizes(4096 * rank, out * rank, rank, clients) for out in (4096, 1024)]
    whole = sum(s.a + s.b for s in sizes)
    each = zip(*(kind.traffic(s) for s in sizes), strict=True)
    return {name: f"{sum(values) / whole:.2g}" for name, values in zip(("bytes up", "bytes down"), each, strict=True)}


def _own(kind: Any) -> str:
    """Return the names of a component's own settings."""
    return ", ".join(kind.Parameters.model_fields)


def _methods() -> Rows:
    from fedtune.methods.traits import by_product, magnitudes

    return [
        {
            "method": m.name,
            "title": m.title,
            "arXiv": m.paper.removeprefix("arXiv:"),
            "exact": m.guarantee == "exact",
            "mixed ranks": m.mixed_ranks,
            "secure sum": m.linear,
            "robust rules": by_product(m),
            "personalised": m.models != "global",
            "DoRA": magnitudes(m) or "no",
            **_traffic(m),
            "settings": _own(m) or "-",
        }
        for m in fedtune.METHODS.values()
    ]


def _wrappers() -> Rows:
    return [
        {"wrapper": name, "what": (kind.__doc__ or "").strip().splitlines()[0], "settings": _own(kind) or "-"}
        for name, kind in fedtune.WRAPPERS.items()
    ]


def _spaces() -> Rows:
    from fedtune.methods.base import ANY

    return [
        {
            "space": space.name,
            "title": space.title,
            "arXiv": space.paper.removeprefix("arXiv:") or "-",
            "ranks": space.factored,
            "several clients a pass": space.factored,
            "methods": ", ".join(m.name for m in fedtune.METHODS.values() if m.spaces & {space.name, *ANY}),
            "saved as": f"{space.folder}/",
            "settings": _own(space) or ("those of lora" if space.factored else "-"),
        }
        for space in fedtune.SPACES.values()
    ]


def _objectives() -> Rows:
    return [
        {
            "objective": o.name,
            "title": o.title,
            "arXiv": o.paper.removeprefix("arXiv:") or "-",
            "texts": o.texts,
            "columns": ", ".join(o.columns) or "-",
            "settings": _own(o) or "-",
        }
        for o in fedtune.OBJECTIVES.values()
    ]


def _domains() -> Rows:
    return [
        {
            "domain": d.name,
            "training (Hub)": d.training.hub.id if d.training.hub else "-",
            "training (packaged)": d.packaged.name,
            "tasks": " ".join(t.name for t in d.tasks) or "-",
            "packaged tasks": " ".join(t.name for t in d.packaged_tasks),
        }
        for d in fedtune.DOMAINS.values()
    ]


def _tasks() -> Rows:
    return [
        {"task": t.name, "domain": d.name, "kind": t.kind, "items": t.n or "-", "packaged": t.packaged is not None}
        for d in fedtune.DOMAINS.values()
        for t in (*d.tasks, *d.packaged_tasks)
    ]


def _kinds() -> Rows:
    from fedtune.config.schema import Mode

    return [
        {
            "kind": name,
            **{word: scorers[word].mode if word in scorers else "-" for word in sorted(get_args(Mode))},
            "metric": ", ".join(sorted({scorer.metric.name for scorer in scorers.values()})),
            "tasks": " ".join(task.name for task in fedtune.TASKS.values() if task.kind == name) or "-",
        }
        for name, scorers in fedtune.KINDS.items()
    ]


def _protocols() -> Rows:
    from fedtune.config import protocol_names, read_protocol

    found = [read_protocol(n) for n in protocol_names()]
    return [
        {"protocol": p.name, "title": p.title, "ranked": p.ranked, "sha256": p.hash[:16], "locked": len(p.locked)}
        for p in found
    ]


def _partitions() -> Rows:
    from fedtune.data.partition import KINDS

    return [{"partition": name, "what": what} for name, what in KINDS.items()]


def _packages() -> Rows:
    from fedtune.data import packages

    found = [p for p in vars(packages).values() if isinstance(p, packages.Package)]
    return [{"package": p.filename, "sha256": p.sha256[:16], "licence": p.licence} for p in found]


LISTS: dict[str, Callable[[], Rows]] = {
    "models": _models,
    "methods": _methods,
    "wrappers": _wrappers,
    "spaces": _spaces,
    "objectives": _objectives,
    "domains": _domains,
    "tasks": _tasks,
    "kinds": _kinds,
    "protocols": _protocols,
    "partitions": _partitions,
    "packages": _packages,
}


def _origins(what: str, rows: Rows) -> Rows:
    """Put the package into each row that is of another one; into all rows where there is one such."""
    # such as fedtune.METHODS; what no other package can offer has no registry
    registry = getattr(fedtune, what.upper(), None)
    found = [registry.origin(str(next(iter(row.values())))) for row in rows] if registry else []
    if not any(found):
        return rows
    return [{**row, "package": str(origin or "fedtune")} for row, origin in zip(rows, found, strict=True)]


def _cell(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


NOTES = {"methods": "Bytes relative to FedIT's: Mistral-7B, q and v, rank 32, 10 clients per round."}
WIDE = 140
NARROW = 24  # words no longer than this are never cut
ROOMY = {
    *("known issues", "template", "personalised", "DoRA", "settings", "arXiv"),
    *("LoRA targets", "title", "training (Hub)", "training (packaged)", "sha256", "what"),
}


def _show(rows: Rows) -> None:
    """Print rows as a table; on a narrow terminal without the columns that need room."""
    from rich import box
    from rich.table import Table

    from fedtune.experiment.progress import terminal

    console = terminal()
    hidden = [name for name in rows[0] if name in ROOMY] if console.width < WIDE and len(rows[0]) > 2 else []
    shown = [name for name in rows[0] if name not in hidden]
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in shown:
        longest = max(len(word) for row in rows for word in _cell(row[name]).split())
        table.add_column(name, min_width=longest if longest <= NARROW else None, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in shown))
    console.print(table)
    if hidden:
        console.print(f"not shown here: {', '.join(hidden)} (wider terminal, or --json)", style="dim")


def ls(
    what: Annotated[str, typer.Argument(help=f"One of: {', '.join(LISTS)}")] = "domains",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what there is: models, methods, their wrappers, spaces, objectives, domains, tasks and the rest."""
    if what not in LISTS:
        fix = nearest(what, LISTS) or f"one of {', '.join(LISTS)}"
        raise ConfigError("command line", [Problem(f"ls {what}", "unknown list", fix)])
    rows = _origins(what, LISTS[what]())
    if json_output:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _show(rows)
        if what in NOTES:
            typer.echo(NOTES[what])
