"""`fedtune run`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.errors import check_withheld
from fedtune.cli.say import say
from fedtune.types import ConfigError, Problem, ResumeError, nearest

if TYPE_CHECKING:
    from fedtune.config import Settings

ARMS = ("federated", "local-only", "centralised")
Setting = Annotated[list[str] | None, typer.Option("--set", "-s", help="Any setting: -s train.max_steps=10")]


def _arms(text: str | None) -> list[str]:
    """Read `--arms all` or a comma list."""
    from fedtune.cli.settings import words

    names = list(ARMS) if text == "all" else words(text)
    able = f"one of {', '.join(ARMS)}"
    if wrong := [n for n in names if n not in ARMS]:
        problems = [Problem(f"--arms {n}", "unknown baseline", nearest(n, ARMS) or able) for n in wrong]
        raise ConfigError("command line", problems)
    return names


def run(
    domain: Annotated[str | None, typer.Argument(help="The domain: fedtune ls domains")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A TOML file of settings.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Frozen settings: fedtune ls protocols")] = None,
    model: Annotated[str | None, typer.Option(help="A zoo name, Hub id or local folder.")] = None,
    method: Annotated[str | None, typer.Option(help="The federated method: fedtune ls methods")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    clients: Annotated[int | None, typer.Option(help="Clients (partitions).")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:0.3, natural …: fedtune ls partitions")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of all random draws.")] = None,
    arm: Annotated[str | None, typer.Option(help="federated, or a baseline alone: local-only, centralised.")] = None,
    arms: Annotated[
        str | None, typer.Option(help="Baselines beside it: all, or a comma list (local-only, centralised).")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A folder with train/ and eval/<domain>/ files.")] = None,
    settings: Setting = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one under runs/).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, else the last one.")] = False,
    force_resume: Annotated[
        bool, typer.Option("--force-resume", help="Continue even though something changed; the run is then unranked.")
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the settings and stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print result.json at the end.")] = False,
) -> None:
    """Fine-tune a model over the clients of one domain, evaluate it, and write a result that can be re-checked."""
    from fedtune.cli.settings import given
    from fedtune.settings import nested, resolve

    extra = _arms(arms)
    resume = resume or force_resume
    if resume:
        out, config = _continued(out, config)
    chosen = nested(
        domain=domain,
        protocol=protocol,
        model=model,
        method=method,
        rounds=rounds,
        clients=clients,
        partition=partition,
        seed=seed,
        arm=arm,
    )
    # a run that goes on was checked when it started, with the arms and the defaults that there were then
    resolved = resolve(config, [chosen, *given(settings)], data, kept=resume, beside=extra)
    if print_config:
        _print(resolved)
        return
    _execute(resolved, out, resume, force_resume, extra, json_output)


def _continued(out: Path | None, config: Path | None) -> tuple[Path, Path]:
    """Return the run folder to continue, and the settings it was made with unless others are given."""
    from fedtune.experiment.folder import SETTINGS, unfinished

    folder = out or unfinished()
    if folder is None:
        raise ResumeError("there is no unfinished run under runs/; name one with --out")
    if not (folder / SETTINGS).exists():
        missing = "holds no run to continue" if folder.exists() else "no such run folder"
        raise ResumeError(f"{folder}: {missing}")
    if out is None:
        say(f"continuing {folder}", err=True)
    return folder, config or folder / SETTINGS


def _print(resolved: Settings) -> None:
    import tomli_w

    from fedtune.methods import METHODS
    from fedtune.methods.wrappers import asked

    typer.echo(tomli_w.dumps(resolved.config.plain()).encode(), nl=False)  # TOML is UTF-8 on every terminal
    typer.echo(f"# config sha256 {resolved.config.hash}")
    typer.echo(f"# protocol {resolved.protocol.name} sha256 {resolved.protocol.hash}")
    kind = METHODS[resolved.config.method.name]
    if around := [wrapper.name for wrapper in asked(resolved.config, kind)]:
        say(f"# wrappers, from the outside in: {', '.join(around)}")
    for reason in resolved.unranked:
        say(f"# unranked: {reason}")


def _execute(resolved: Settings, out: Path | None, resume: bool, force: bool, extra: list[str], as_json: bool) -> None:
    from fedtune.cli.tables import doubts, scores
    from fedtune.experiment.progress import TerminalReporter, terminal
    from fedtune.experiment.run import run as execute
    from fedtune.results import schema

    console = terminal(errors=as_json)
    watch = TerminalReporter(console)
    folder, result = execute(resolved, out, resume=resume, force=force, extra_arms=extra, reporter=watch)
    if as_json:
        typer.echo(json.dumps(result.model_dump(mode="json"), indent=1))
    tables = scores(result.arms, folder)
    for table in tables:
        console.print(table)
    if any("*" in cell for table in tables for column in table.columns for cell in map(str, column.cells)):
        console.print("* the paired 95 % interval of the gain excludes 0", style="dim")
    for line in doubts(result):
        console.print(line)
    console.print(f"run folder: {folder.resolve()}", soft_wrap=True)
    own = next(arm.scores for arm in result.arms if arm.name == resolved.config.arm)
    check_withheld(schema.withheld(own), len(own))
