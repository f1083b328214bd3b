"""The store: nothing is overwritten, a flag outlives every later publishing, people write only flags into it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.board.store import by_hand, holds, read_entry, write_entry
from fedtune.board.validate import check
from fedtune.cli import app
from fedtune.evaluation import again
from fedtune.io import read_json, write_json
from fedtune.results.entry import Entry
from fedtune.types import DataError
from tests.board.entries import entry

FILES = {"evals/federated/fpb.likelihood.jsonl.gz": "a" * 64}


def test_the_same_submission_is_added_again_and_a_flag_stays(tmp_path: Path) -> None:
    one = entry(0, files=FILES)
    path = write_entry(tmp_path, one)
    flagged = one.model_copy(update={"state": "flagged", "reasons": ["trained on the test set"]})
    write_json(path, flagged.model_dump(mode="json"))
    assert write_entry(tmp_path, one) == path
    assert read_entry(path) == flagged
    # what is made from the files may change with the code; the flag does not
    write_entry(tmp_path, one.model_copy(update={"unranked": ["a new rule"]}))
    assert (read_entry(path).state, read_entry(path).unranked) == ("flagged", ["a new rule"])


@pytest.mark.parametrize(
    ("there", "fresh", "then"),
    [
        ("reported", "re-scored", "re-scored"),
        ("re-scored", "reported", "re-scored"),
        ("re-run", "re-scored", "re-run"),
        ("re-scored", "re-run", "re-run"),
        ("flagged", "re-run", "flagged"),
    ],
)
def test_a_state_is_never_taken_back_by_adding(tmp_path: Path, there: str, fresh: str, then: str) -> None:
    path = write_entry(tmp_path, entry(0, files=FILES, state=there))
    write_entry(tmp_path, entry(0, files=FILES, state=fresh))
    assert read_entry(path).state == then


def test_another_submission_takes_no_ones_place(tmp_path: Path) -> None:
    write_entry(tmp_path, entry(0, files=FILES))
    for other in (entry(0, files={**FILES, "x.json": "b" * 64}), entry(0, files=FILES, team="another")):
        with pytest.raises(DataError, match="it is another one"):
            write_entry(tmp_path, other)
        assert not holds(tmp_path, other)
    assert holds(tmp_path, entry(0, files=FILES))


def _changed(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def run(store: Path) -> None:
        path = next(store.rglob("seed-1.json"))
        document = read_json(path)
        change(document)
        write_json(path, document)

    return run


def _new(store: Path) -> None:
    write_entry(store, entry(5))


BY_HAND: list[tuple[Callable[[Path], None], str]] = [
    (_changed(lambda e: e.update(state="flagged", reasons=["cheated"])), ""),
    (lambda store: (store / "README.md").write_text("new words") and None, ""),
    (_changed(lambda e: e.update(state="re-run")), "a flag is state flagged with reasons"),
    (_changed(lambda e: e.update(state="flagged", reasons=[])), "a flag is state flagged with reasons"),
    (_changed(lambda e: e.update(reasons=["the best of all"])), "a flag is state flagged with reasons"),
    (_changed(lambda e: e.update(team="somebody else")), "differs in more than its flag"),
    (_changed(lambda e: e.update(state="flagged", reasons=["x"], unranked=[])), ""),
    (_changed(lambda e: e["arms"][-1]["scores"][0].update(score=1.0)), "differs in more than its flag"),
    (_new, "is new or gone"),
    (lambda store: shutil.rmtree(store / "finance"), "is new or gone"),
    (lambda store: (store / "page.js").write_text("x") and None, "is new or gone"),
]


@pytest.mark.parametrize(("change", "said"), BY_HAND)
def test_people_write_nothing_but_flags(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    write_entry(tmp_path / "before", entry(0, files=FILES))
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    change(tmp_path / "after")
    found = [str(p) for p in by_hand(tmp_path / "before", tmp_path / "after")]
    assert all(said in line for line in found), found
    assert bool(found) == bool(said)
    done = CliRunner().invoke(app, ["board", "by-hand", str(tmp_path / "before"), str(tmp_path / "after")])
    assert done.exit_code == (4 if said else 0)


def test_a_store_that_is_a_link_or_not_there_is_a_problem(tmp_path: Path) -> None:
    write_entry(tmp_path / "store", entry(0, files=FILES))
    (tmp_path / "link").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "file").write_text("")
    for other in ("link", "file", "nothing"):
        for pair in ((other, "store"), ("store", other)):
            done = CliRunner().invoke(app, ["board", "by-hand", *(str(tmp_path / name) for name in pair)])
            assert done.exit_code == 4
            what = "no such folder" if other == "nothing" else "is a link, or no folder"
            assert f"{other}: {what}" in done.output


@pytest.mark.xdist_group("submission")
def test_one_that_is_refused_keeps_no_other_out(good: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    # a seed of so many digits is no name of a file
    sound = read_json(good / "seed-1/entry.json")
    (tmp_path / "bad/entry.json").write_text(json.dumps({**sound, "seed": 10**300}))
    store = tmp_path / "store"
    done = CliRunner().invoke(app, ["board", "add", str(tmp_path / "bad"), str(good), "--store", str(store)])
    assert done.exit_code == 4
    assert "refused: 1 of 2 submissions" in done.output
    assert len(list(store.rglob("seed-*.json"))) == 2
    second = CliRunner().invoke(app, ["board", "add", str(good), "--store", str(store)])
    assert "already" in second.output
    assert second.exit_code == 0


@pytest.mark.xdist_group("submission")
def test_a_row_says_where_programs_were_not_run_again(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(again, "unable", lambda task: "no sandbox works on this machine")
    monkeypatch.setattr("fedtune.board.validate.TASKS", {"fpb": _Program()})
    checked = CliRunner().invoke(app, ["validate", str(good)])
    assert "fpb: programs not run again here: no sandbox works on this machine" in checked.output
    assert checked.exit_code == 0
    CliRunner().invoke(app, ["board", "add", str(good), "--store", str(tmp_path / "store")])
    found = [read_entry(p) for p in (tmp_path / "store").rglob("*.json")]
    assert {e.state for e in found} == {"reported"}
    assert {r for e in found for r in e.reasons} == {
        "fpb: programs not run again here: no sandbox works on this machine"
    }


@pytest.mark.xdist_group("submission")
def test_what_the_disk_refuses_keeps_no_other_out(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(store: Path, made: Entry) -> Path:
        if made.seed == 1:
            raise OSError("File name too long")
        return write_entry(store, made)

    monkeypatch.setattr("fedtune.board.store.write_entry", full)
    store = tmp_path / "store"
    paths = [str(good / "seed-1"), str(good / "seed-2")]
    done = CliRunner().invoke(app, ["board", "add", *paths, "--store", str(store)])
    assert done.exit_code == 4
    assert "seed-1: File name too long" in done.output
    assert [read_entry(p).seed for p in store.rglob("*.json")] == [2]


@pytest.mark.xdist_group("submission")
@pytest.mark.parametrize("fault", [MemoryError(), RecursionError("too deep"), KeyError("x"), ZeroDivisionError()])
def test_whatever_one_raises_keeps_no_other_out(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def dies(path: Path) -> Any:
        if path.name == "seed-1":
            raise fault
        return check(path)

    monkeypatch.setattr("fedtune.board.validate.check", dies)
    store = tmp_path / "store"
    paths = [str(good / "seed-1"), str(good / "seed-2")]
    done = CliRunner().invoke(app, ["board", "add", *paths, "--store", str(store)])
    assert done.exit_code == 4
    assert f"seed-1: cannot be checked ({type(fault).__name__}" in done.output
    assert [read_entry(p).seed for p in store.rglob("*.json")] == [2]


class _Program:
    kind = "program"
    n = 0
