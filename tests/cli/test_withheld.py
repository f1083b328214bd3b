"""A command that ends without the score it was to give does not exit 0; what it did stays written."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli import app
from fedtune.cli.errors import check_withheld
from fedtune.evaluation import metrics
from fedtune.io import read_json
from fedtune.types import DataError, RunFailedError

FEW = ("eval.tasks=['fpb']", "eval.modes=['likelihood']", "eval.limit=3")
SHORT = (*FEW, "eval.base=false", "federation.rounds=1", "federation.clients=2", "train.max_steps=1")


def test_all_scores_and_some_scores_withheld_end_differently() -> None:
    check_withheld({}, 0)
    check_withheld({}, 2)
    with pytest.raises(RunFailedError, match=r"^score withheld:\n  fpb/official: no sandbox$"):
        check_withheld({"fpb/official": "no sandbox"}, 1)
    with pytest.raises(RunFailedError, match="all 2 scores withheld"):
        check_withheld({"fpb/official": "a", "fiqa/official": "b"}, 2)
    with pytest.raises(DataError, match=r"1 of 2 scores\):\n  fpb/official: no sandbox"):
        check_withheld({"fpb/official": "no sandbox"}, 2)


@pytest.mark.parametrize("command", ["run", "sweep", "eval"])
def test_a_command_without_its_score_exits_with_the_reason_and_keeps_what_it_did(
    command: str, tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "withheld", lambda rows, limit: "too many items raised an error")
    given = [w for s in (FEW if command == "eval" else SHORT) for w in ("-s", s)]
    model = [str(tiny_folder), "--domain", "finance"] if command == "eval" else ["finance", "--model", str(tiny_folder)]
    # what is complete is not done again, and lacks its score still
    for _ in range(2 if command == "sweep" else 1):
        words = [command, *model, "--data", str(data_folder), *given, "--out", str(tmp_path)]
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, RunFailedError), done.output
        assert "fpb/likelihood: too many items raised an error" in str(done.exception)
    if command == "run":
        assert read_json(tmp_path / "manifest.json")["status"] == "complete"
        assert read_json(tmp_path / "result.json")["arms"][0]["scores"][0]["score"] is None
    if command == "sweep":
        assert read_json(tmp_path / "sweep.json")["failed"] == {}
        (row,) = read_json(tmp_path / "sweep.json")["rows"]
        assert (row["asked"], len(row["withheld"]), row["scores"]) == (1, 1, {})
