"""Programs of a stranger's log are run again: what is said to pass must pass, with tests that did not come along."""

from collections.abc import Iterator
from typing import Any

import pytest

from fedtune.domains import TASKS
from fedtune.domains.base import Item
from fedtune.evaluation import again, sandbox

TASK = TASKS["humaneval-packaged"]
PASSED = {"kind": "passed", "compiled": True, "detail": ""}
WRONG = {"kind": "wrong", "compiled": True, "detail": ""}


def row(i: int, program: str, outcome: dict[str, Any] = PASSED) -> dict[str, Any]:
    return {"i": i, "programs": [program], "outcomes": [outcome]}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    again._unable.cache_clear()
    yield
    again._unable.cache_clear()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three problems: f must give 0, 1, 2."""
    items = tuple(Item("def f():", "", (f"assert f() == {n}",), 0, str(n)) for n in range(3))
    monkeypatch.setattr(again, "tests_at_hand", lambda task: items)
    if sandbox.engine() is None:
        pytest.skip(f"no sandbox works here: {sandbox.MISSING}")


@pytest.mark.usefixtures("known")
def test_what_is_said_to_pass_must_pass() -> None:
    rows = [row(i, f"def f():\n    return {i}") for i in range(3)]
    assert list(again.failing(TASK, rows)) == []
    rows[1] = row(1, "raise SystemExit(1)")
    assert list(again.failing(TASK, rows)) == [(1, "error")]
    rows[1] = row(1, "def f():\n    return 9")
    assert list(again.failing(TASK, rows)) == [(1, "wrong")]
    # what is said to fail adds to no score and is not run
    rows[1] = row(1, "import os\nos.abort()", WRONG)
    assert list(again.failing(TASK, rows)) == []


@pytest.mark.usefixtures("known")
def test_an_item_that_is_none_of_the_set_is_named() -> None:
    for place in (3, -1, 10**9):
        assert list(again.failing(TASK, [row(place, "def f():\n    return 2")])) == [(place, "is no item of the set")]


@pytest.mark.usefixtures("known")
def test_enough_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "ENOUGH", 2)
    rows = [row(i % 3, "raise SystemExit(1)") for i in range(12)]
    assert len(list(again.failing(TASK, rows))) == 2


def test_what_is_too_much_is_not_run() -> None:
    assert again.too_much([row(0, "x")]) == ""
    assert "a program of 200,001 characters" in again.too_much([row(0, "x" * 200_001)])
    many = {"i": 0, "programs": ["x"] * 20_001, "outcomes": [PASSED] * 20_001}
    assert "20,001 programs" in again.too_much([many])


def test_why_programs_cannot_be_run_again_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "engine", lambda: None)
    assert "no sandbox works on this machine" in again.unable(TASK)


def test_the_answer_is_one_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that comes back between two questions makes nothing count as run that was not."""
    monkeypatch.setattr(sandbox, "engine", lambda: None)
    first = again.unable(TASK)
    monkeypatch.undo()
    assert again.unable(TASK) == first
    assert first
