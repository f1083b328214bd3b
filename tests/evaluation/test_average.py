"""The score of clients that were evaluated each alone."""

from pathlib import Path

import pytest

from fedtune.evaluation.metrics import mean_score
from fedtune.io import write_lines
from fedtune.results.schema import Score


def _log(path: Path, correct: list[bool]) -> Path:
    write_lines(path, [{"task": "fpb"}, *({"i": i, "correct": c} for i, c in enumerate(correct))])
    return path


def test_everything_is_a_mean_over_clients_not_the_first_one_s(tmp_path: Path) -> None:
    logs = [_log(tmp_path / "a", [True, True]), _log(tmp_path / "b", [True, False])]
    one = Score(task="x", mode="official", n=2, score=1.0, valid_rate=1.0, strict=1.0, details={"share_passed": 1.0})
    two = Score(task="x", mode="official", n=2, score=0.5, valid_rate=0.0, strict=0.5, errors=1)
    mean = mean_score([one, two], logs)
    assert (mean.score, mean.valid_rate, mean.strict, mean.errors) == (0.75, 0.5, 0.75, 1)
    assert mean.details == {"share_passed": 0.5}
    assert mean.interval is not None
    assert mean.interval[0] <= 0.75 <= mean.interval[1]


@pytest.mark.parametrize("withheld_first", [True, False])
def test_a_client_without_a_score_leaves_no_mean(tmp_path: Path, withheld_first: bool) -> None:
    logs = [_log(tmp_path / "a", [True]), _log(tmp_path / "b", [True])]
    known = Score(task="x", mode="official", n=1, score=1.0)
    gone = Score(task="x", mode="official", n=1, score=None, withheld="too many errors")
    mean = mean_score([gone, known] if withheld_first else [known, gone], logs)
    assert (mean.score, mean.interval, mean.withheld) == (None, None, "too many errors")
