"""A score is what its samples give, in every number; and the samples are what a run writes."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.board import samples
from fedtune.board.samples import recomputed
from fedtune.config.schema import EvalSettings
from fedtune.evaluation import again
from fedtune.evaluation.scorers import KINDS
from fedtune.results.schema import Arm, Score
from tests.evaluation.test_again import PASSED

ITEMS = "i" * 64


def chosen(i: int, gold: str = "A", best: int = 0) -> dict[str, Any]:
    scores = [-1.0 if k == best else -2.0 for k in range(4)]
    right = "ABCD"[best] == gold
    return {
        **{"i": i, "group": "", "gold": gold, "predicted": "ABCD"[best], "answers": list("ABCD")},
        **{"correct": right, "strict": right, "valid": True, "scores": scores},
    }


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., list[str]]:
    """Write a log of medqa by likelihood and hold a score against it: by default the one it gives."""

    def run(rows: list[Any], header: dict[str, Any] | None = None, **changes: Any) -> list[str]:
        path = samples.log_path(tmp_path, "federated", "medqa", "likelihood")
        path.parent.mkdir(parents=True, exist_ok=True)
        first = {"task": "medqa", "mode": "likelihood", "items": ITEMS, **(header or {})}
        path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in [first, *rows]).encode()))
        sound = [chosen(i) for i in range(8)]
        score = KINDS["choice"]["likelihood"].summarise("medqa", sound, items=ITEMS)
        score = score.model_copy(update=changes)
        return list(recomputed(tmp_path, Arm(name="federated", scores=[score]), score))

    return run


SOUND = [chosen(i) for i in range(8)]


def test_sound_samples_give_their_score(judge: Callable[..., list[str]]) -> None:
    assert judge(SOUND) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scores": None}, "has not one likelihood for each answer"),
        ({"scores": []}, "has not one likelihood for each answer"),
        ({"scores": [1.0] * 5}, "has not one likelihood for each answer"),
        ({"scores": [True, 0, 0, 0]}, "has not one likelihood for each answer"),
        ({"scores": [-1.0, -2.0, "x", -2.0]}, "has not one likelihood for each answer"),
        ({"scores": [None] * 4}, "the model's likelihood of every answer is zero"),
        ({"scores": [0.5, -2.0, -2.0, -2.0]}, "the model's likelihood of an answer is above 1"),
        ({"scores": [None, -2.0, -2.0, -2.0]}, "predicted is 'A', it gives 'B'"),
        ({"predicted": "x" * 10**6}, "x, it gives 'A'"),
        ({"scores": [-3.0, -2.0, -2.5, -2.6]}, "predicted is 'A', it gives 'B'"),
        ({"gold": "B"}, "correct is True, it gives False"),
        ({"gold": "E"}, "is none of its answers"),
        ({"answers": ["A", "A", "A", "A"]}, "not those of the task"),
        ({"answers": "ABCD"}, "not those of the task"),
        ({"strict": False}, "strict is False, it gives True"),
        ({"valid": False}, "valid is False, it gives True"),
        ({"i": "0"}, "has no place in the set"),
        ({"value": 1.0}, "it has value, which no such sample has"),
        ({"output": "A"}, "it has output, which no such sample has"),
        ({"same_prompt_as": 1}, "it names another sample"),
        ({"i": False}, "has no place in the set"),
        (
            {"error": "RuntimeError", "correct": False, "strict": False, "valid": False},
            "an item that raised has an answer or counts as right",
        ),
        ({"error": "RuntimeError"}, "an item that raised has an answer or counts as right"),
    ],
)
def test_a_sample_that_is_not_judged_as_a_run_judges_is_named(
    judge: Callable[..., list[str]], changes: dict[str, Any], said: str
) -> None:
    (problem,) = judge([{**SOUND[0], **changes}, *SOUND[1:]])
    assert len(problem) < 300
    assert problem.startswith("1 samples are judged wrongly; the first: item ")
    assert said in problem


def test_an_easy_item_does_not_count_twice(judge: Callable[..., list[str]]) -> None:
    assert judge([SOUND[0], *SOUND[:7]]) == ["an item is there twice, or they are not in order"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": 0.5}, "score is 0.5, the samples give 1.0"),
        ({"n": 80}, "n = 80, there are 8 samples"),
        ({"interval": (0.99, 1.0)}, "interval is (0.99, 1.0)"),
        ({"interval": None}, "interval is None"),
        ({"trivial": {}}, "trivial is {}"),
        ({"errors": 3}, "errors is 3, the samples give 0"),
        ({"macro_f1": 1.0}, "macro_f1 is 1.0"),
        ({"withheld": "later"}, "withheld is later"),
        ({"details": {"x": 1.0}}, "details is {'x': 1.0}"),
        ({"metric": "pass@1"}, "metric is pass@1"),
        ({"items_sha256": "j" * 64}, "its samples are of other items"),
    ],
)
def test_every_number_of_a_score_is_made_again(
    judge: Callable[..., list[str]], changes: dict[str, Any], said: str
) -> None:
    assert any(said in problem for problem in judge(SOUND, **changes))


def test_a_log_of_another_task_or_none_is_refused(judge: Callable[..., list[str]], tmp_path: Path) -> None:
    assert any("another task or mode" in p for p in judge(SOUND, {"task": "medmcqa"}))
    assert any("another task or mode" in p for p in judge(SOUND, {"mode": "official"}))
    nothing = Score(task="medqa", mode="official", n=8, score=1.0, items_sha256=ITEMS)
    assert "has no samples" in next(recomputed(tmp_path, Arm(name="federated", scores=[nothing]), nothing))
    unknown = nothing.model_copy(update={"task": "../../etc/passwd"})
    assert list(recomputed(tmp_path, Arm(name="x", scores=[unknown]), unknown)) == ["is of no task that is known here"]


@pytest.mark.parametrize(
    ("mode", "count", "good"), [("official", 3, True), ("official", 2, False), ("greedy", 3, False)]
)
def test_each_item_has_as_many_programs_as_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, count: int, good: bool
) -> None:
    rows = [{"i": i, "programs": ["pass"] * 3, "outcomes": [PASSED] * 3, "correct": True, "value": 1.0} for i in (0, 1)]
    path = samples.log_path(tmp_path, "federated", "humaneval", mode)
    path.parent.mkdir(parents=True)
    first = {"task": "humaneval", "mode": mode, "items": ITEMS}
    path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in [first, *rows]).encode()))
    scorer = KINDS["program"]["official" if mode == "official" else "likelihood"]
    score = scorer.summarise("humaneval", rows, EvalSettings(samples=3), ITEMS)
    ran: list[Any] = []
    monkeypatch.setattr(again, "unable", lambda task: "")
    monkeypatch.setattr(again, "failing", lambda task, rows, *_: iter(ran.append(rows) or ()))
    found = list(recomputed(tmp_path, Arm(name="federated", scores=[score]), score, EvalSettings(samples=count)))
    assert bool(ran) == good
    assert found == (
        [] if good else [f"item 0 has not as many programs as the settings say ({count if mode == 'official' else 1})"]
    )


def test_programs_that_are_said_to_pass_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"i": i, "group": str(i), "programs": ["raise SystemExit(1)"], "outcomes": [PASSED]} for i in range(3)]
    rows = [{**r, "correct": True, "value": 1.0} for r in rows]
    path = samples.log_path(tmp_path, "federated", "humaneval", "official")
    path.parent.mkdir(parents=True)
    first = {"task": "humaneval", "mode": "official", "items": ITEMS}
    path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in [first, *rows]).encode()))
    score = KINDS["program"]["official"].summarise("humaneval", rows, items=ITEMS)
    arm = Arm(name="federated", scores=[score])
    monkeypatch.setattr(again, "unable", lambda task: "")
    monkeypatch.setattr(again, "failing", lambda task, rows, *_: iter([(0, "error"), (2, "wrong")]))
    assert list(recomputed(tmp_path, arm, score)) == [
        "2 programs do not pass as they are said to; the first: item 0, error"
    ]
    monkeypatch.setattr(again, "unable", lambda task: "no sandbox")
    assert list(recomputed(tmp_path, arm, score)) == []
