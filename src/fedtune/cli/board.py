"""`fedtune submit`, `validate`, `verify`, `report` and `board`: results that nobody has to trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.errors import Group
from fedtune.cli.say import say
from fedtune.types import ConfigError, FedtuneError, Problem, counted

board = typer.Typer(cls=Group, no_args_is_help=True, help="The leaderboard: built from entries in git, by anyone.")
REJECTED = 4


def submit(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders: the seeds of one algorithm.")],
    out: Annotated[Path, typer.Option(help="The submission's folder.")],
    team: Annotated[str, typer.Option(help="Who submits; plain text, shown on the board.")] = "",
    title: Annotated[str, typer.Option(help="What to call it.")] = "",
    link: Annotated[str, typer.Option(help="An https address with more about it.")] = "",
) -> None:
    """Pack finished runs: recipe, seeds, adapters, per-sample files, byte log, model cards."""
    from pydantic import ValidationError

    from fedtune.board.submit import pack

    try:
        entries = pack(runs, out, team, title, link)
    except ValidationError as err:
        problems = [Problem(f"--{e['loc'][0]}", e["msg"]) for e in err.errors()]
        raise ConfigError("fedtune submit", problems) from err
    for entry in entries:
        say(f"{out / f'seed-{entry.seed}'}: {entry.domain}, {entry.base}, {entry.method}")
        for reason in entry.unranked:
            say(f"  not ranked: {reason}")
    if len(entries) < 3:
        typer.echo(f"{len(entries)} of the 3 seeds that are asked for; run the others with --seed")


def validate(
    path: Annotated[Path, typer.Argument(help="A submission: a folder, or a zip of one.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a submission as the board does, and print every problem; exit code 4 if there is one."""
    from fedtune.board.validate import check, not_run_again

    found = [(name, problems, not_run_again(entry) if entry else []) for name, entry, problems in check(path)]
    if json_output:
        lines = [{"run": name, "problems": [*map(str, problems)], "notes": notes} for name, problems, notes in found]
        typer.echo(json.dumps(lines, indent=1))
    else:
        for name, problems, notes in found:
            say(f"{name}: {'good' if not problems else counted(len(problems), 'problem')}")
            for line in (*problems, *notes):
                say(f"  {line}")
    if any(problems for _, problems, _ in found):
        raise typer.Exit(REJECTED)


def verify(
    path: Annotated[Path, typer.Argument(help="A packed run (a folder with entry.json).")],
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds to run again.")] = 3,
    data: Annotated[str, typer.Option(help="The folder of training files, where the run read one.")] = "",
) -> None:
    """Run the first rounds again and compare them with the submission; exit code 4 if they differ."""
    from fedtune.experiment.progress import TerminalReporter, terminal
    from fedtune.experiment.verify import verify as replay
    from fedtune.io import read_lines

    found = replay(path, rounds, data, TerminalReporter(terminal(errors=True)))
    for line in found:
        say(line)
    made = min(rounds, len(read_lines(path / "rounds.jsonl")))
    typer.echo(f"{counted(made, 'round')} run again: {'different' if found else 'the same'}")
    if found:
        raise typer.Exit(REJECTED)


def report(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to write (default: report.html in the run folder).")] = None,
    md: Annotated[bool, typer.Option("--md", help="Markdown instead of HTML.")] = False,
) -> None:
    """Write a one-page report of a run."""
    from fedtune.board import report as reports
    from fedtune.board.entries import from_run
    from fedtune.io import write_bytes

    entry = from_run(run)
    target = out or run / ("report.md" if md else "report.html")
    write_bytes(target, (reports.markdown(entry) if md else reports.page(entry)).encode())
    say(str(target))


@board.command("build")
def build(
    store: Annotated[Path, typer.Argument(help="The folder of entries.")],
    out: Annotated[Path, typer.Option(help="Where the page goes.")],
) -> None:
    """Build index.html and board.json; the page opens from disk and loads nothing else."""
    from fedtune.board.site import build as make

    data = make(store, out)
    if not data["entries"]:
        say(f"{store}: has no entries yet; the page says how to submit one")
    for line in data["left_out"]:
        say(f"warning: {line}", err=True)
    say(f"{out / 'index.html'}: {counted(len(data['rows']), 'row')} of {counted(data['entries'], 'entry', 'entries')}")


def _added(path: Path, store: Path, state: str) -> bool:
    """Put one submission's entries into the store, all or none, or say why not."""
    from fedtune.board.store import duplicate, settled, write_entry
    from fedtune.board.validate import added, check, not_run_again

    if state != "re-run" and added(path, store):
        say(f"{path}: is in {store} already")
        return True
    found = check(path)
    bad = [f"{name}: {p}" for name, _, problems in found for p in problems]
    bad += [f"{name}: has the samples of {there}" for name, e, _ in found if e and (there := duplicate(store, e))]
    for line in bad:
        say(f"{path}: {line}", err=True)
    if bad:
        return False
    fresh = []
    for entry in (e for _, e, _ in found if e):
        notes = not_run_again(entry)
        update = {"state": "reported" if notes and state != "re-run" else state, "reasons": notes}
        fresh.append(entry.model_copy(update=update))
    for entry in [settled(store, entry) for entry in fresh]:
        say(str(write_entry(store, entry)))
    return True


def _added_or_said(path: Path, store: Path, state: str) -> bool:
    """Add a submission as `_added` does; whatever one makes it raise is said, and keeps no other out."""
    try:
        return _added(path, store, state)
    except (FedtuneError, OSError) as err:
        say(f"{path}: {err}", err=True)
    # no memory left, or what nobody thought of: the next submission is not to suffer for it
    except Exception as err:
        say(f"{path}: cannot be checked ({type(err).__name__}: {' '.join(str(err).split())[:300]})", err=True)
    return False


@board.command("add")
def add(
    paths: Annotated[list[Path], typer.Argument(help="Submissions: folders, or zips of them.")],
    store: Annotated[Path, typer.Option(help="The folder of entries.")],
    state: Annotated[str, typer.Option(help="re-scored, or re-run after fedtune verify.")] = "re-scored",
) -> None:
    """Validate submissions and add their entries to the store; a refused one (exit code 4) does not stop the others."""
    if state not in ("re-scored", "re-run"):
        raise ConfigError("command line", [Problem(f"--state {state}", "must be re-scored or re-run")])
    done = [_added_or_said(path, store, state) for path in paths]
    if not all(done):
        say(f"refused: {done.count(False)} of {counted(len(done), 'submission')}", err=True)
        raise typer.Exit(REJECTED)


@board.command("by-hand")
def by_hand(
    before: Annotated[Path, typer.Argument(help="The store before the change.")],
    after: Annotated[Path, typer.Argument(help="The store after it.")],
) -> None:
    """Check that only flags were changed by hand in a store; exit code 4 if anything else was."""
    from fedtune.board.store import by_hand as changed

    found = list(changed(before, after))
    for problem in found:
        say(str(problem), err=True)
    if found:
        raise typer.Exit(REJECTED)


@board.command("flag")
def flag(
    path: Annotated[Path, typer.Argument(help="An entry in the store.")],
    reason: Annotated[str, typer.Option(help="Why it is not believed; shown in its row.")],
) -> None:
    """Flag an entry: it stays on the board, without a rank, with the reason."""
    from fedtune.board.store import read_entry
    from fedtune.io import write_json
    from fedtune.results.entry import Entry, plain_text

    entry = read_entry(path)
    try:
        reasons = [*entry.reasons, plain_text(reason)]
    except ValueError as err:
        raise ConfigError("command line", [Problem("--reason", str(err))]) from err
    flagged = Entry.model_validate({**entry.model_dump(), "state": "flagged", "reasons": reasons})
    write_json(path, flagged.model_dump(mode="json"))
    say(f"flagged: {path}")


@board.command("import-published")
def import_published(
    folder: Annotated[Path, typer.Argument(help="Published submissions with an index.json.")],
    store: Annotated[Path, typer.Option(help="The folder of entries.")],
    skip_programs: Annotated[bool, typer.Option(help="Leave the code domain out (no sandbox here).")] = False,
) -> None:
    """Score published FlowerTune submissions again from their generations and put them into the store."""
    from fedtune.board import published
    from fedtune.board.store import write_entry

    skipped = ("code",) if skip_programs else ()
    for entry in published.read(folder, lambda what: say(f"scoring {what}"), skipped):
        say(f"{entry.state}: {write_entry(store, entry)}")
        for reason in entry.reasons:
            say(f"  {reason}")


@board.command("schema")
def schema() -> None:
    """Print the JSON Schema of an entry."""
    from fedtune.results.entry import Entry

    typer.echo(json.dumps(Entry.model_json_schema(), indent=1))
