"""Programs of a stranger's log are run again: what is said to pass must pass, with tests that did not come along."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedtune.domains import TASKS
from fedtune.domains.base import Item
from fedtune.evaluation import again, sandbox
from fedtune.types import FedtuneError

TASK = TASKS["humaneval-packaged"]
PASSED = {"kind": "passed", "compiled": True, "detail": ""}
WRONG = {"kind": "wrong", "compiled": True, "detail": ""}


def row(i: int, program: str, outcome: dict[str, Any] = PASSED) -> dict[str, Any]:
    return {"i": i, "programs": [program], "outcomes": [outcome]}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    again.unable.cache_clear()
    yield
    again.unable.cache_clear()


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


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every program pass and take 100 seconds of a clock that only they move; return those that were run."""
    items, begun = tuple(Item("", "", ("",), 0, "") for _ in range(200)), []
    now = [0.0]
    monkeypatch.setattr(again, "tests_at_hand", lambda task: items)
    monkeypatch.setattr(again.time, "monotonic", lambda: now[0])

    def run(texts: list[str], tests: list[str], language: str, on_done: Callable[[int], None]) -> list[Any]:
        for number, text in enumerate(texts, 1):
            now[0] += 100
            begun.append(text)
            on_done(number)
        return [sandbox.Outcome("passed")] * len(texts)

    monkeypatch.setattr(again.programs, "run", run)
    return begun


def test_programs_that_pass_and_sleep_are_given_up_when_their_time_together_is_over(naps: list[str]) -> None:
    rows = [row(i, f"nap {i}") for i in range(200)]
    with pytest.raises(FedtuneError, match="at most 1,800 seconds are given to all programs of a submission"):
        list(again.failing(TASK, rows))
    assert len(naps) == 18


def test_all_logs_of_a_submission_have_one_time_together(naps: list[str]) -> None:
    with again.one_submission():
        for start in (0, 10):
            if start:
                with pytest.raises(FedtuneError, match="have not ended in time"):
                    list(again.failing(TASK, [row(i, "nap") for i in range(start, start + 10)]))
            else:
                assert list(again.failing(TASK, [row(i, "nap") for i in range(10)])) == []
        assert len(naps) == 18
        with pytest.raises(FedtuneError, match="have not ended in time"):
            list(again.failing(TASK, [row(0, "one more")]))
        assert "one more" not in naps
    with again.one_submission():
        assert list(again.failing(TASK, [row(0, "of another submission")])) == []


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
