"""A sample that no evaluation writes is refused by one function, in a log that is continued and on the board."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Settings
from fedtune.config.schema import EvalSettings
from fedtune.domains import TASKS
from fedtune.domains.base import Item
from fedtune.evaluation import likelihood
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.run import evaluate
from fedtune.evaluation.scorers import KINDS
from fedtune.io import read_lines
from fedtune.types import CorruptFileError

QUESTION = Item("q", "q", ("A", "B", "C"), 0)
OUTCOME = {"kind": "wrong", "compiled": True, "detail": ""}
WROTE = {"programs": ["x"], "outcomes": [OUTCOME], "correct": False, "value": 0.0}
PROGRAM = KINDS["program"]["likelihood"]
SOLUTION = KINDS["solution"]["likelihood"]
OFFICIAL = KINDS["choice"]["official"]


@pytest.mark.parametrize("error", [{}, {"error": "raised"}])
@pytest.mark.parametrize(
    "changes",
    [{"outcomes": [OUTCOME | {"compiled": value}]} for value in (-7, 1, 1e9, math.inf, "x", None, [True], {})]
    + [{"outcomes": [OUTCOME | {"kind": value}]} for value in ("\x1b[31m<b>", "", [], {}, None, 0)]
    + [{"outcomes": outcomes} for outcomes in ([], [OUTCOME] * 3, [{}], [[]], ["wrong"], OUTCOME, None)]
    + [
        {"outcomes": [OUTCOME | {"kind": "passed"}]},
        {"outcomes": [OUTCOME | {"kind": "passed"}], "correct": True, "value": 1.5},
        {"programs": [1]},
        {"output": "x"},
    ],
    ids=str,
)
def test_outcomes_are_those_of_the_sandbox_one_for_each_program(changes: dict[str, Any], error: dict[str, str]) -> None:
    assert PROGRAM.misjudged({"i": 0, **WROTE, **error}) == ""
    assert PROGRAM.misjudged({"i": 0, **WROTE, **error, **changes})


def test_a_program_of_an_item_that_raised_has_not_passed() -> None:
    passed = {"outcomes": [OUTCOME | {"kind": "passed"}], "error": "raised"}
    for claimed in ({"correct": True, "value": 1.0}, {"correct": False, "value": 0}, {"correct": False, "value": None}):
        assert PROGRAM.misjudged({"i": 0, **WROTE, **passed, **claimed})


@pytest.mark.parametrize("value", [12.5, 1e308, -1e308, math.inf, -math.inf, math.nan, 10**400, -(10**400), True, "1"])
def test_the_value_of_a_solution_is_a_log_likelihood(value: Any) -> None:
    good = {"i": 0, **SOLUTION.sample(QUESTION, [-1.5])}
    assert SOLUTION.misjudged(good) == ""
    assert SOLUTION.misjudged(good | {"value": value})
    assert SOLUTION.misjudged(good | {"error": "raised", "value": value})
    assert not isinstance(value, float) or "error" in SOLUTION.sample(QUESTION, [value])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("choice", "likelihood"), ("choice", "official"), ("sentiment", "official"), ("solution", "likelihood")],
)
def test_an_item_that_raised_gave_nothing(kind: str, mode: str) -> None:
    scorer, item = KINDS[kind][mode], Item("q", "q", ("negative", "neutral") if kind == "sentiment" else ("A", "B"), 0)
    row = {"i": 0, **scorer.failed(item, "raised")}
    assert scorer.misjudged(row) == ""
    for name in ("answers", "scores", "output", "programs", "outcomes"):
        assert f"it has {name}" in scorer.misjudged({**row, name: ["A"]})
    for name in ("correct", "predicted"):
        assert scorer.misjudged({**row, name: "A"})
    for gold in ("<b>", "AB", 5, ["A"]):
        assert scorer.misjudged({**row, "gold": gold})
    if kind != "solution":
        assert scorer.misjudged({key: value for key, value in row.items() if key != "strict"})


def official(i: int, item: Item = QUESTION, output: str = "A", **more: Any) -> dict[str, Any]:
    return {"i": i, **OFFICIAL.sample(item, output), **more}


@pytest.mark.parametrize(
    ("rows", "good"),
    [
        ([official(0, same_prompt_as=3), official(3)], True),
        ([official(0, Item("q", "q", ("A", "B", "C"), 1), same_prompt_as=3), official(3)], True),
        ([official(0, same_prompt_as=3), {"i": 3, **OFFICIAL.failed(QUESTION, "raised")}], True),
        ([official(0), official(3, same_prompt_as=9)], True),
        ([official(0, same_prompt_as=2), official(3)], False),
        ([official(0, same_prompt_as=3), official(3, Item("q", "q", ("A", "B"), 0))], False),
        ([official(0, same_prompt_as=3), official(3, same_prompt_as=9)], False),
        ([official(0), official(3, same_prompt_as=0)], False),
        ([official(0, same_prompt_as=0), official(3)], False),
        *[([official(0, same_prompt_as=name), official(3)], False) for name in ("3", 3.0, None, True, [3], {})],
    ],
)
def test_a_sample_takes_the_output_of_a_later_one_with_its_answers_alone(rows: list[Any], good: bool) -> None:
    assert [OFFICIAL.misjudged(row) for row in rows] == ["", ""]
    assert (OFFICIAL.check_log(rows, EvalSettings()) == "") == good


@pytest.mark.parametrize(
    ("kind", "mode", "given"),
    [
        ("choice", "likelihood", [-1.0, -2.0, -3.0]),
        ("boolean", "likelihood", [-1.0, -2.0, -3.0]),
        ("sentiment", "official", "x"),
    ],
)
def test_only_official_answers_to_questions_are_taken_from_others(kind: str, mode: str, given: Any) -> None:
    scorer = KINDS[kind][mode]
    answers = scorer.form.answers or ("A", "B", "C")  # type: ignore[attr-defined]
    for row in (scorer.sample(Item("q", "q", answers, 0), given), scorer.failed(Item("q", "q", answers, 0), "raised")):
        assert scorer.misjudged({"i": 0, **row}) == ""
        assert "names another sample" in scorer.misjudged({"i": 0, **row, "same_prompt_as": 1})


def _evaluated(
    task: str,
    given: Sequence[Sequence[float]],
    log: Path,
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], Any]:
    """Return an evaluation of a model that gives these likelihoods."""
    left = iter(given)

    def score(model: Any, tokenizer: Any, items: Sequence[Item], *_: Any) -> Iterator[list[Any]]:
        yield [next(left) for _ in items]

    monkeypatch.setattr(likelihood, "score", score)
    items = TaskItems(TASKS[task], (QUESTION,) * len(given), tuple(range(len(given))), "hash")
    return lambda: evaluate(None, None, items, "likelihood", settings().config, log, "me")


def test_an_answer_whose_likelihood_is_zero_is_written_and_read_back(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    run = _evaluated("medqa", [[-math.inf, -2.0, -3.0], [-1.0, -math.inf, -math.inf]], log, settings, monkeypatch)
    score, written = run(), log.read_bytes()
    assert (score.score, score.errors) == (0.5, 0)
    assert [row["scores"] for row in read_lines(log)[1:]] == [[None, -2.0, -3.0], [-1.0, None, None]]
    assert run() == score
    assert log.read_bytes() == written


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1e308", "1" + "0" * 400, "12.5", "null", "NaN"])
def test_a_log_with_a_line_that_does_not_hold_is_named_and_left_as_it_is(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    log = tmp_path / "log.jsonl"
    run = _evaluated("algorithms-solutions", [[-1.0], [-2.0]], log, settings, monkeypatch)
    assert run().score == -1.5
    spoilt = log.read_text().replace("-2.0", value) + '{"i": 2, "torn'
    log.write_text(spoilt)
    with pytest.raises(CorruptFileError, match=re.escape(f"{log}: line 3")):
        run()
    assert log.read_text() == spoilt


def test_a_torn_tail_goes_when_all_else_holds(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    run = _evaluated("algorithms-solutions", [[-1.0], [-2.0], [-3.0]], log, settings, monkeypatch)
    run()
    whole = log.read_text()
    log.write_text(whole + json.dumps({"i": 3})[:4])
    assert run().score == -2.0
    assert log.read_text() == whole
