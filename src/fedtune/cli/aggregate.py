"""`fedtune aggregate`: aggregate adapter or model folders that anybody made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.say import say
from fedtune.results.bounds import LARGEST_INT
from fedtune.types import ConfigError, Problem, counted


def _examples(text: str | None, clients: int) -> list[int]:
    """Read `--examples 10,20`; one example each by default."""
    if text is None:
        return [1] * clients
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if len(counts) != clients or not all(0 < n <= LARGEST_INT for n in counts):
        what = f"must be {clients} whole numbers above 0, one per client, at most {LARGEST_INT:,}"
        raise ConfigError("command line", [Problem(f"--examples {text:.100}", what, "for example 10,20,30")])
    return counts


def _whole(chosen: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    """Take a whole number out of the settings."""
    value = chosen.pop(name, default)
    if type(value) is not int or not least <= value <= most:
        what = f"must be a whole number from {least} to {most:,}"
        raise ConfigError("command line", [Problem(f"--set {name}={value!s:.40}", what)])
    return value


def _settings(assignments: list[str]) -> tuple[dict[str, Any], int, int]:
    """Split `--set` into the method's own settings, the round, and the rank of the result."""
    from fedtune.config import parse_assignment

    chosen: dict[str, Any] = {}
    for text in assignments:
        chosen.update(parse_assignment(text))
    round_, rank = _whole(chosen, "round", 1, 1, 10**6), _whole(chosen, "rank", 0, 0, 4096)
    return chosen, round_, rank


def aggregate(
    method: Annotated[str, typer.Option(help="The method: fedtune ls methods")],
    out: Annotated[Path, typer.Option(help="The new folder: the global adapter, or model.")],
    clients: Annotated[list[Path], typer.Option(help="PEFT adapter folders or model folders; more may follow.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[DIR]...", help="More client folders.")] = None,
    examples: Annotated[str | None, typer.Option(help="Examples of each client: 10,20,30")] = None,
    global_: Annotated[Path | None, typer.Option("--global", help="The adapter the clients started from.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A setting of the method, round or rank.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model: for DoRA, or if the folders' names differ.")] = None,
    effective: Annotated[Path | None, typer.Option(help="Also write the dense update of each weight here.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Aggregate adapters or models with a method's server half; no base model is needed but for DoRA."""
    from fedtune import api

    folders = [*clients, *(more or [])]
    own, round_, rank = _settings(settings or [])
    counts = _examples(examples, len(folders))
    result = api.aggregate(
        method,
        folders,
        out,
        examples=counts,
        parameters=own,
        start=global_,
        base=base,
        effective=effective,
        round_=round_,
        rank=rank,
    )
    facts = {
        "method": method,
        "clients": len(folders),
        "weights": list(result.weights),
        "tensors": len(plain) if (plain := result.plain) is not None else None,
        "modules": len(result.state.adapter) if plain is None else None,
        "rank": max(m.rank for m in result.adapter.values()) if plain is None else None,
        "relative_error": result.error,
        "out": str(out),
        "adapters": [str(folder) for folder in result.folders],
        "effective": str(effective) if effective else None,
    }
    if json_output:
        typer.echo(json.dumps(facts))
    for line in [] if json_output else _said(facts):
        say(line)


def _said(facts: dict[str, Any]) -> list[str]:
    noun = "adapter" if facts["tensors"] is None else "folder"
    many = counted(facts["clients"], noun) + (" (nothing to average it with)" if facts["clients"] == 1 else "")
    if facts["tensors"] is not None:
        return [f"{facts['method']}: {many} of {counted(facts['tensors'], 'tensor')}", f"  {facts['out']}"]
    lines = [f"{facts['method']}: {many} of {counted(facts['modules'], 'layer')}, rank {facts['rank']}"]
    lines += [f"  {folder}" for folder in facts["adapters"]]
    if facts["relative_error"] is None:
        lines.append("no global model: each client has its own")
    else:
        error = f"{facts['relative_error']:.3e}"
        lines.append(f"distance of the effective update to the clients' weighted mean: {error} of its norm")
    return lines
