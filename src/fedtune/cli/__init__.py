"""The command line. Each command imports what it needs when it runs, so that `--help` and lists are instant."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import typer

from fedtune import __version__
from fedtune.cli import aggregate, board, conformance, data, doctor, errors, evaluate, info, run, score, sweep
from fedtune.cli.say import PlainFormatter
from fedtune.types import CancelledError

# libraries keep quiet beside our own progress
QUIET = {
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}

app = typer.Typer(
    name="fedtune",
    cls=errors.Group,
    help="Benchmark, toolkit and leaderboard for federated fine-tuning of large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("sweep")(sweep.sweep)
app.command("eval")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("score")(score.score)
app.command("aggregate")(aggregate.aggregate)
app.command("conformance")(conformance.conformance)
app.command("submit")(board.submit)
app.command("validate")(board.validate)
app.command("verify")(board.verify)
app.command("report")(board.report)
app.add_typer(board.board, name="board")
app.command("data")(data.data)
app.command("ls")(info.ls)
app.command("doctor")(doctor.doctor)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Benchmark, toolkit and leaderboard for federated fine-tuning of large language models."""


def main() -> None:
    """Run the command line; however it ends, it ends with a message and not with a traceback."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("fedtune").setLevel(logging.INFO)
    errors.encodable()
    try:
        app()
    except KeyboardInterrupt:
        errors.interrupted()
    except (Exception, CancelledError) as err:
        errors.end(err)
