"""Whatever is done to a file of a submission ends in a report: no other exception, and no other entry taken for good."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.board import card, report
from fedtune.board.archive import opened
from fedtune.board.build import board
from fedtune.board.entries import from_run
from fedtune.board.site import page
from fedtune.board.store import read_entry, write_entry
from fedtune.board.validate import check, check_one
from fedtune.io import file_sha256
from fedtune.results.entry import Entry
from fedtune.types import FedtuneError
from tests.board.entries import entry
from tests.faults.mutate import copies, damaged

pytestmark = pytest.mark.xdist_group("submission")

# what a submitter says of a run freely
TEXTS = {"team", "title", "link", "state", "reasons"}
# files for other programs, which the board never reads: only their listed hash is checked
UNREAD = {".eval_results/fedtune.yaml", "README.md", "results_lm_eval.json"}


def _relisted(packed: Path) -> None:
    """Make the listed hashes those of the files, as a careful cheat would."""
    entry = json.loads((packed / "entry.json").read_text())
    entry["files"] = {n: file_sha256(packed / n) for n in entry["files"] if (packed / n).exists()}
    (packed / "entry.json").write_text(json.dumps(entry))


def _differ(one: Entry, two: Entry) -> set[str]:
    """Return the fields in which two entries differ, but for the hashes of their files."""
    return {name for name in Entry.model_fields if getattr(one, name) != getattr(two, name)} - {"files"}


def _hurt(good: Path, scratch: Path, count: int, *, careful: bool) -> Iterator[tuple[str, str, list[str]]]:
    """Yield what was done to which file, and the problems found; the submission is whole again for the next one."""
    packed = scratch / "seed-1"
    shutil.copytree(good / "seed-1", packed)
    entry = (packed / "entry.json").read_bytes()
    files = sorted(p for p in packed.rglob("*") if p.is_file())
    for number in range(count):
        path = files[number % len(files)]
        sound = path.read_bytes()
        name = str(path.relative_to(packed))
        how, copy = damaged(sound, number)
        path.write_bytes(copy)
        if careful and path.name != "entry.json":
            _relisted(packed)
        yield name, f"{how}, seed {number}", [str(p) for p in check_one(packed)[1]]
        path.write_bytes(sound)
        (packed / "entry.json").write_bytes(entry)


def _careless(good: Path, scratch: Path, count: int) -> None:
    """Every damage is found, but for another spelling of the same entry, and texts that are free."""
    sound = read_entry(good / "seed-1/entry.json")
    for name, how, problems in _hurt(good, scratch, count, careful=False):
        if not problems:
            assert name == "entry.json", (name, how)
            assert _differ(read_entry(scratch / "seed-1/entry.json"), sound) <= TEXTS, how


def _careful(good: Path, scratch: Path, count: int) -> None:
    """Where the hashes are made to match, what is found comes from the contents: a sound file makes the same entry."""
    sound, refused = from_run(good / "seed-1"), set[str]()
    for name, how, problems in _hurt(good, scratch, count, careful=True):
        assert all("Traceback" not in p and "\n" not in p for p in problems), (name, problems)
        refused |= {name} if problems else set()
        if not problems:
            assert _differ(from_run(scratch / "seed-1"), sound) == set(), (name, how)
    files = {str(p.relative_to(good / "seed-1")) for p in (good / "seed-1").rglob("*") if p.is_file()}
    assert refused == files - UNREAD


def test_damage_is_reported(good: Path, tmp_path: Path) -> None:
    _careless(good, tmp_path, 100)


def test_damage_with_matching_hashes_ends_in_a_report(good: Path, tmp_path: Path) -> None:
    _careful(good, tmp_path, 150)


def test_a_damaged_run_is_packed_and_reported_or_refused_in_a_sentence(good: Path, tmp_path: Path) -> None:
    packed = tmp_path / "seed-1"
    shutil.copytree(good / "seed-1", packed)
    said: list[str] = []
    for name in ("result.json", "manifest.json", "rounds.jsonl", "config.toml"):
        sound = (packed / name).read_bytes()
        for _, copy in copies(sound, 40):
            (packed / name).write_bytes(copy)
            try:
                report.page(from_run(packed))
            except FedtuneError as err:
                said.append(str(err))
        (packed / name).write_bytes(sound)
    assert len(said) > 60
    assert [line for line in said if str(packed) not in line] == []


def test_a_damaged_entry_in_the_store_is_named_or_shown(tmp_path: Path) -> None:
    for number in (0, 4):
        write_entry(tmp_path / "store", entry(number))
    path = next((tmp_path / "store").rglob("seed-1.json"))
    sound, refused = path.read_bytes(), 0
    for _, copy in copies(sound, 150):
        path.write_bytes(copy)
        try:
            page(board(tmp_path / "store"))
            card.model_card(read_entry(path))
        except FedtuneError as err:
            refused += path.name in str(err)
    assert refused > 75


@pytest.mark.slow
def test_much_damage(good: Path, tmp_path: Path) -> None:
    _careless(good, tmp_path / "a", 5000)
    _careful(good, tmp_path / "b", 5000)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_damaged_archive_is_reported(good: Path, tmp_path: Path) -> None:
    """Of 200 damaged zips none is taken for good unless it unpacks to the very same files."""
    whole = Path(shutil.make_archive(str(tmp_path / "whole"), "zip", good / "seed-1")).read_bytes()
    target, sound = tmp_path / "s.zip", _files(good / "seed-1")
    taken = 0
    for how, copy in copies(whole, 200):
        target.write_bytes(copy)
        found = check(target)
        assert found, how
        if all(not problems for _, _, problems in found):
            with opened(target) as (packed, problems):
                assert ([_files(p) for p in packed], problems) == ([sound], []), how
            taken += 1
    assert 0 < taken < 40
