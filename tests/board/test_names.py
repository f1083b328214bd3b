"""A name in somebody else's files is part of a path: none leads out of the folder of the logs, by whatever it is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedtune.board.entries import from_run
from fedtune.board.sets import client_subdirs, log_path
from fedtune.board.submit import pack
from fedtune.board.validate import check
from fedtune.domains import TASKS
from fedtune.results.entry import Point
from fedtune.results.schema import Arm, Score
from fedtune.types import CorruptFileError

ODD = ["../x", "x/../../y", "/etc", "a/b", "./federated", ".hidden", "..", ".", "", "a\\b", "a\n", "x" * 81]
PRIVATE = "a row of somebody else's"


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_name_that_could_be_a_path_is_refused_in_every_document(odd: str) -> None:
    for made in (
        lambda: Score(task=odd, mode="official", n=1, score=None),
        lambda: Score(task="fpb", mode=odd, n=1, score=None),
        lambda: Arm(name=odd, scores=[]),
        lambda: Point(round=1, task=odd, mode="official", score=None),
        lambda: Point(round=1, task="fpb", mode=odd, score=None),
    ):
        with pytest.raises(ValidationError):
            made()


@pytest.mark.parametrize(
    "odd", ["../x", "/etc", "./federated", "x/../../y", "..", "federated/", "federated//client-0001"]
)
def test_no_log_outside_is_looked_for_whatever_is_asked(tmp_path: Path, odd: str) -> None:
    for subdir, task, mode in (
        (odd, "fpb", "official"),
        ("federated", f"{odd}/x", "m"),
        ("federated", "fpb", f"m/{odd}"),
    ):
        with pytest.raises(CorruptFileError, match="is no name of an arm"):
            log_path(tmp_path, subdir, task, mode)
    with pytest.raises(CorruptFileError, match="is no name of an arm"):
        client_subdirs(tmp_path, odd)


def test_every_task_mode_and_room_of_a_run_has_a_name() -> None:
    for subdir in ("base", "federated", "local-only", "centralised", "round-000002", "federated/client-0001"):
        for task in TASKS:
            log_path(Path("run"), subdir, task, "likelihood")
            Score(task=task, mode="greedy", n=1, score=None)


def _by_mode(run: Path, result: dict[str, Any]) -> None:
    (run / "evals/federated/x.y").mkdir()
    mode = "y/../../../../private/rows"
    result["arms"][-1]["scores"].append({"task": "x", "mode": mode, "n": 1, "score": None, "withheld": "w"})


def _by_arm(run: Path, result: dict[str, Any]) -> None:
    scores = [{"task": "fpb", "mode": "likelihood", "n": 1, "score": None, "withheld": "w"}]
    result["arms"].append({"name": "../../private", "scores": scores})


def _by_curve(run: Path, result: dict[str, Any]) -> None:
    (run / "evals/round-000001").mkdir()
    line = {"round": 1, "task": "../../../private/rows", "mode": "x", "score": None}
    (run / "curve.jsonl").write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize("change", [_by_mode, _by_arm, _by_curve])
def test_a_stranger_s_run_packs_nothing_from_outside(
    runs: list[Path], tmp_path: Path, change: Callable[[Path, dict[str, Any]], None]
) -> None:
    run, private = tmp_path / "run", tmp_path / "private"
    shutil.copytree(runs[0], run)
    private.mkdir()
    for name in ("rows.jsonl", "rows.x.jsonl", "fpb.likelihood.jsonl"):
        (private / name).write_text(json.dumps({"i": PRIVATE}) + "\n" + json.dumps({"i": PRIVATE}) + "\n")
    result = json.loads((run / "result.json").read_text())
    change(run, result)
    (run / "result.json").write_text(json.dumps(result))
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CorruptFileError, match="is not of its format") as caught:
        from_run(run)
    assert PRIVATE not in str(caught.value)
    with pytest.raises(CorruptFileError):
        pack([run], tmp_path / "out", "a team")
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_submission_that_names_a_path_is_refused_before_anything_is_read_by_it(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "s")
    place = next(iter(sorted((tmp_path / "s").glob("*/entry.json"))))
    (tmp_path / "private").mkdir()
    (tmp_path / "private/fpb.likelihood.jsonl").write_text(
        json.dumps({"i": PRIVATE}) + "\n" + json.dumps({"i": PRIVATE})
    )
    made = json.loads(place.read_text())
    scores = [{"task": "fpb", "mode": "likelihood", "n": 1, "score": None}]
    made["arms"].append({"name": "../../../private", "scores": scores})
    place.write_text(json.dumps(made))
    found = [str(p) for _, _, problems in check(tmp_path / "s") for p in problems]
    assert any("arms" in said for said in found)
    assert not any(PRIVATE in said for said in found)
