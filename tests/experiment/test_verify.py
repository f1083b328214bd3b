"""What a run that is made again is held against."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.experiment import verify
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.verify import differences
from fedtune.io import write_lines
from fedtune.types import CancelledError, ConfigError, CorruptFileError, RoundRecord


def rounds(loss: float | None = 2.0, **changes: Any) -> list[dict[str, Any]]:
    client = {"client": 0, "examples": 8, "steps": 2, "loss": loss}
    return [{"round": 1, "cohort": [0], "status": "ok", "bytes_up": 1, "bytes_down": 1, "clients": [client], **changes}]


def test_losses_are_the_same_within_two_percent_and_none_is_only_none() -> None:
    assert differences(rounds(2.0), rounds(2.03)) == []
    assert differences(rounds(None), rounds(None)) == []
    assert differences(rounds(2.0), rounds(2.1)) == ["round 1: client 0 had loss 2.0000, has 2.1000"]
    assert differences(rounds(None), rounds(2.0)) == ["round 1: client 0 had loss none, has 2.0000"]
    assert differences(rounds(0.0), rounds(None)) == ["round 1: client 0 had loss 0.0000, has none"]


def test_everything_else_is_the_same_exactly() -> None:
    for key, value in (("cohort", [1]), ("status", "skipped"), ("bytes_up", 2), ("bytes_down", 2), ("clients", [])):
        assert len(differences(rounds(), rounds(**{key: value}))) == 1, key
    other = copy.deepcopy(rounds())
    other[0]["clients"][0].update(examples=9, steps=3)
    assert differences(rounds(), other) == [
        "round 1: client 0 had 8 examples, has 9",
        "round 1: client 0 had 2 steps, has 3",
    ]
    assert differences(rounds(), []) == ["1 round to be run again, 0 ended"]


@pytest.mark.parametrize("line", [{}, [], "x", None, {"round": 1}, {**rounds()[0], "clients": None}])
def test_what_is_no_record_of_rounds_is_said_to_be_none(line: Any) -> None:
    with pytest.raises(CorruptFileError, match="no record of rounds"):
        differences([line], rounds())


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(CorruptFileError, match="no record of rounds"):
        differences(rounds("2.0"), rounds(2.0))  # type: ignore[arg-type]


class _Stopped(Reporter):
    def round(self, record: RoundRecord) -> None:
        raise CancelledError(0)


def test_a_replay_stops_after_its_rounds_and_passes_on_a_stop_that_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(settings: Any, out: Path, reporter: Reporter) -> None:
        write_lines(out / "rounds.jsonl", rounds())
        reporter.round(SimpleNamespace(round=1))  # type: ignore[arg-type]
        raise AssertionError("went on after the last round")

    monkeypatch.setattr(verify, "run", run)
    monkeypatch.setattr(verify, "load", lambda layers, **options: None)
    (tmp_path / "config.toml").write_text("seed = 1\n")
    write_lines(tmp_path / "rounds.jsonl", rounds())
    assert verify.verify(tmp_path, 1) == []
    with pytest.raises(CancelledError):
        verify.verify(tmp_path, 1, watch=_Stopped())


@pytest.mark.parametrize("table", ["eval", "data"])
def test_a_table_of_settings_that_is_no_table_is_named(tmp_path: Path, table: str) -> None:
    (tmp_path / "config.toml").write_text(f'domain = "finance"\n{table} = 5\n')
    write_lines(tmp_path / "rounds.jsonl", rounds())
    with pytest.raises(ConfigError, match=rf"{table} = 5: Input should be a valid dictionary"):
        verify.verify(tmp_path, 1, data=str(tmp_path))
