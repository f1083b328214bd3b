"""Whole sets by their hashes: equal to the data at hand; leaving out, repeating and re-labelling is seen."""

import json

import pytest

from fedtune.domains import TASKS
from fedtune.evaluation.known import samples_sha256, sets, shortfall
from tests.evaluation.known_sets import hashes, measured

ROWS = [{"i": i, "group": "", "gold": "ABCD"[i % 4], "answers": list("ABCD")} for i in range(1273)]


def test_the_table_has_hashes_only_and_every_task() -> None:
    assert set(sets()) == set(TASKS)
    found = [sha for modes in sets().values() for each in modes.values() for sha in each]
    assert all(len(sha) == 64 and set(sha) <= set("0123456789abcdef") for sha in found)
    assert len(json.dumps(sets())) < 10_000


@pytest.mark.packaged
def test_the_table_is_of_the_data_at_hand() -> None:
    seen = 0
    for task, found in measured():
        for mode, sha in hashes(task, found).items():
            assert sha in sets()[task.name][mode], (task.name, mode)
        assert task.n == len(found), task.name
        seen += 1
    if not seen:
        pytest.skip("no evaluation set is at hand")


def test_a_part_of_a_set_is_not_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"medqa": {"any": [samples_sha256(ROWS, "gold")]}}
    monkeypatch.setattr("fedtune.evaluation.known.sets", lambda: whole)

    def said(rows: list[dict[str, object]], task: str = "medqa") -> str:
        return shortfall(task, "likelihood", "gold", 1273, rows)

    assert said(ROWS) == ""
    assert said(ROWS[:10]) == "10 items, the whole set has 1,273"
    easy = [{**r, "gold": "A"} for r in ROWS]
    assert "not those of the known set" in said(easy)
    assert "not those of the known set" in said([*ROWS[:-1], ROWS[0]])
    assert "not those of the known set" in said([ROWS[1], ROWS[0], *ROWS[2:]])
    assert "not those of the known set" in said([{**ROWS[0], "same_prompt_as": 5}, *ROWS[1:]])
    assert said(ROWS, "own-set") == "no whole set of this task is known"
