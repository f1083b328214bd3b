"""What commands print is readable: it fits 80 columns, has no empty column, and says what is missing."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedtune.board.report import page
from fedtune.cli import app
from fedtune.cli.evaluate import _compared
from fedtune.cli.info import LISTS
from fedtune.cli.tables import doubts, scores
from fedtune.results.schema import Arm, Score
from fedtune.results.stats import compare
from fedtune.types import MissingFileError, counted
from tests.board.entries import entry


@pytest.mark.parametrize("what", LISTS)
def test_every_list_fits_80_columns_with_short_words_whole(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["ls", what])
    assert done.exit_code == 0
    table = done.output.split("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 80
    if what == "models":
        assert "Apache-2.0" in done.output
        assert "not shown here" in done.output
        assert "known issues" in " ".join(done.output.split())


def printed(table: object, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_a_comparison_fits_80_columns_with_the_longest_task_and_numbers() -> None:
    right, wrong = [1.0] * 12_345, [0.0] * 12_345
    text = printed(_compared({"nyt-econ-sentiment.likelihood": compare(right, wrong)}))
    for part in ("nyt-econ-sentiment.likelihood", "12345", "-1.000 to -1.000", "lost"):
        assert part in text
    assert "-0.1234 to" not in text
    values = printed(_compared({"algorithms-solutions.likelihood": compare([0.25, 0.5], [0.5, 0.25])}))
    assert "None" not in values


def test_an_evaluation_without_a_base_model_has_no_column_of_gains() -> None:
    score = Score(task="fpb", mode="likelihood", metric="accuracy", n=4, score=0.5, interval=(0.1, 0.9), valid_rate=1.0)
    (table,) = scores([Arm(name="federated", scores=[score])])
    assert [column.header for column in table.columns] == ["model", "n", "score", "95 % interval", "valid"]


def test_reasons_against_a_rank_stand_on_a_line_each() -> None:
    result = SimpleNamespace(unranked=["first", "second"], skipped_rounds=1, rounds=1, lost_clients=1, arms=[])
    lines = doubts(result)  # type: ignore[arg-type]
    assert lines[:3] == ["unranked:", "  first", "  second"]
    assert lines[3].startswith("1 of 1 round changed nothing")
    assert lines[4].endswith("1 client reply")
    assert counted(1000, "reply", "replies") == "1,000 replies"


MISSING = {
    "verify": ["/nowhere"],
    "report": ["/nowhere"],
    "submit": ["/nowhere", "--out", "x"],
    "score": ["medqa", "/nowhere"],
    "score humaneval": ["/nowhere"],
    "compare": ["/nowhere", "/nowhere"],
    "eval": ["/nowhere", "--domain", "finance"],
    "eval --base x": ["/nowhere", "--domain", "finance"],
    "aggregate": ["--method", "fedit", "--clients", "/nowhere", "--out", "x"],
    "run --resume": ["--out", "/nowhere"],
    "run -c": ["/nowhere"],
    "run finance --data": ["/nowhere"],
    "validate": ["/nowhere"],
    "board add --store x": ["/nowhere"],
    "board build --out x": ["/nowhere"],
    "board flag --reason x": ["/nowhere"],
    "board import-published --store x": ["/nowhere"],
    "board by-hand": ["/nowhere", "/nowhere"],
}


@pytest.mark.parametrize("command", MISSING)
def test_a_path_that_does_not_exist_is_said_to_be_missing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*command.split(), *MISSING[command]])
    assert done.exit_code != 0
    text = done.output + str(done.exception)
    assert "no such" in text
    assert "/nowhere" in text
    assert type(done.exception).__name__ != "CorruptFileError"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_another_file_needs_is_missing_and_not_damaged(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert isinstance(done.exception, MissingFileError)
    assert str(done.exception) == f"{tmp_path}/run/manifest.json: no such file"


def test_a_report_of_one_round_has_a_sentence_in_place_of_an_empty_chart() -> None:
    one, several = (page(entry(0, losses=losses, curve=[])) for losses in ([2.0], [2.0, 1.5]))
    assert "<p>training loss by round: 2.0000 in round 1</p>" in one
    assert "<svg" not in one
    assert "<svg" in several
