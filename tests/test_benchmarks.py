"""The rows of a benchmark's table say where they come from, and rows of different origins are in different tables."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import origin

ROOT = Path(__file__).parents[1]


def row(what: str, **changes: Any) -> dict[str, Any]:
    return {"what": what, "made": {**origin.here(2), **changes}}


def test_every_row_says_machine_versions_code_and_day() -> None:
    [made] = origin.stamped([{"what": "a step"}], origin.here(2))
    assert set(made["made"]) == origin.KEYS == {"date", "machine", "versions", "code", "threads"}
    assert made["made"]["machine"]["processor"] is not None
    assert len(made["made"]["code"]["sha256"]) == 64
    assert {"torch", "python", "fedtune"} <= set(made["made"]["versions"])


def test_a_row_keeps_its_origin_beside_fresh_ones() -> None:
    old = row("old", date="2020-01-01", machine={"processor": "another", "cpus": 64, "gpus": 0})
    kept, fresh = origin.stamped([old, {"what": "fresh"}], origin.here(2))
    assert kept == old
    assert fresh["made"]["date"] != "2020-01-01"


OTHERS = {
    "machine": {"processor": "another", "cpus": 64, "gpus": 0},
    "versions": {"torch": "1.0"},
    "code": {"sha256": "0" * 64, "commit": "abc", "dirty": False},
    "threads": 64,
}


@pytest.mark.parametrize("what", OTHERS)
def test_rows_of_two_origins_never_share_a_table(what: str) -> None:
    tables = origin.together([row("a"), row("b", **{what: OTHERS[what]}), row("c", date="2020-01-01")])
    assert [[r["what"] for r in table] for table in tables] == [["a", "c"], ["b"]]
    assert origin.said(tables[0]) != origin.said(tables[1]) or what == "versions"


def test_a_row_without_its_origin_is_refused() -> None:
    with pytest.raises(ValueError, match="a row says"):
        origin.together([{"what": "a", "made": {"date": "today"}}])


def test_the_published_speed_table_has_every_row_under_its_origin() -> None:
    document = json.loads((ROOT / "benchmarks/results/speed.json").read_text())
    page = (ROOT / "benchmarks/results/speed.md").read_text()
    tables = origin.together(origin.stamped(document["rows"], document))
    assert page.count("Measured on ") == len(tables)
    for table in tables:
        part = page.split(f"Measured on {origin.said(table)}:")[1].split("Measured on ")[0]
        assert all(f"| {each['what']} |" in part for each in table)
