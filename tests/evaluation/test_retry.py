"""An error costs its own item alone; what else is asked, and in which batches, stays as it was."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config import Config, Settings
from fedtune.domains.base import Item, Task, multiple_choice
from fedtune.evaluation import generate, likelihood, official, programs
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.retry import Failed, batches
from fedtune.evaluation.run import evaluate
from fedtune.evaluation.sandbox import Outcome
from fedtune.evaluation.scorers import KINDS
from fedtune.evaluation.scorers.program import Program
from fedtune.io import read_lines, write_lines
from fedtune.types import CancelledError, CorruptFileError, ModelError


def grid(bad: set[int], size: int, asked: list[tuple[int, ...]]) -> Callable[[int, int], Iterator[list[Any]]]:
    """Return an evaluation whose results are the batches they come from; batches with a bad item raise."""

    def ask(first: int, last: int) -> Iterator[list[Any]]:
        for start in range(first, last, size):
            batch = tuple(range(start, min(start + size, last)))
            asked.append(batch)
            if bad & set(batch):
                raise RuntimeError("out of memory")
            yield [batch] * len(batch)

    return ask


def test_one_bad_item_of_twenty_is_evaluated_alone_with_its_batch_only() -> None:
    asked: list[tuple[int, ...]] = []
    found = [r for batch in batches(grid({5}, 4, asked), 0, 20, 4) for r in batch]
    assert asked == [
        *((0, 1, 2, 3), (4, 5, 6, 7)),
        (4, 5, 6, 7),
        *((4,), (5,), (6,), (7,)),
        *((8, 9, 10, 11), (12, 13, 14, 15), (16, 17, 18, 19)),
    ]
    assert found[5] == Failed("RuntimeError: out of memory")
    assert found[8] == (8, 9, 10, 11), "the batches after the error are whole"


@given(st.sets(st.integers(0, 29)), st.integers(1, 8), st.integers(1, 30))
def test_items_without_an_error_in_their_batch_are_asked_as_ever(bad: set[int], size: int, count: int) -> None:
    found = [r for batch in batches(grid(bad, size, []), 0, count, size) for r in batch]
    clean = [r for batch in grid(set(), size, [])(0, count) for r in batch]
    assert len(found) == count
    for place, (got, want) in enumerate(zip(found, clean, strict=True)):
        if place in bad:
            assert isinstance(got, Failed)
        else:
            assert got == (want if not bad & set(want) else (place,))


def test_an_error_of_the_moment_changes_nothing() -> None:
    calm = grid(set(), 4, [])
    left = [1]

    def once(first: int, last: int) -> Iterator[list[Any]]:
        for number, batch in enumerate(calm(first, last)):
            if number == 2 and left and left.pop():
                raise MemoryError("for now")
            yield batch

    assert list(batches(once, 0, 20, 4)) == list(calm(0, 20))


@pytest.mark.parametrize("error", [CancelledError(15), ModelError("no such layer"), KeyboardInterrupt()])
def test_cancelling_and_what_a_user_can_repair_pass(error: BaseException) -> None:
    def ask(first: int, last: int) -> Iterator[list[int]]:
        yield [first] * 4
        raise error

    found = batches(ask, 0, 20, 4)
    assert next(found) == [0] * 4
    with pytest.raises(type(error)):
        next(found)


CHOICES = tuple(multiple_choice("Answer.", f"Which {i} one", [f"o{i}", "x y", "z"], i % 3) for i in range(40))


def items(kind: Any, some: tuple[Item, ...] = CHOICES) -> TaskItems:
    return TaskItems(Task("toy", kind, lambda row: None), some, tuple(range(len(some))), "h")


def test_the_official_batches_after_an_error_are_the_official_ones(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampled batch's random stream and its padding come from its place: they must not move."""
    seen: list[tuple[int, int]] = []

    def sentiment(model: Any, tokenizer: Any, some: Any, new_tokens: int, first: int) -> Iterator[list[str]]:
        for start in range(0, len(some), 32):
            batch = some[start : start + 32]
            seen.append((first + start, len(batch)))
            if any(item is CHOICES[3] for item in batch):
                raise KeyError("offset_mapping")
            yield ["A"] * len(batch)

    monkeypatch.setattr(official, "sentiment", sentiment)
    lax = tiny_config.model_copy(update={"eval": tiny_config.eval.model_copy(update={"max_error_rate": 0.5})})
    found = evaluate(None, None, items("sentiment"), "official", lax, tmp_path / "log.jsonl", "me")
    assert (found.n, found.errors) == (40, 1)
    assert seen[0] == seen[1] == (0, 32)
    assert seen[2:-1] == [(i, 1) for i in range(32)]
    assert seen[-1] == (32, 8)
    assert read_lines(tmp_path / "log.jsonl")[4]["error"] == "KeyError: 'offset_mapping'"


def test_a_program_whose_generation_raises_counts_as_failed(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complete(model: Any, tokenizer: Any, prompts: Any, stops: Any, how: Any, samples: int, places: Any) -> Any:
        if any("Which 1 one" in prompt for prompt in prompts):
            raise RuntimeError("CUDA out of memory")
        yield [["good"] * samples for _ in prompts]

    monkeypatch.setattr(generate, "complete", complete)
    monkeypatch.setattr(Program, "unavailable", lambda self, task: "")
    monkeypatch.setattr(
        programs,
        "run",
        lambda texts, tests, language: [
            Outcome("passed" if t.endswith("good") else "error", "", compiled=True) for t in texts
        ],
    )

    class Model:
        def parameters(self) -> Any:
            return iter(())

    few = items("program", CHOICES[:4])
    lax = tiny_config.model_copy(update={"eval": tiny_config.eval.model_copy(update={"max_error_rate": 0.5})})
    found = evaluate(Model(), None, few, "official", lax, tmp_path / "a.jsonl", "me")
    assert (found.score, found.errors, found.n) == (0.75, 1, 4)
    strict = evaluate(Model(), None, few, "official", tiny_config, tmp_path / "b.jsonl", "me")
    assert strict.score is None
    assert strict.withheld == "1 of 4 items raised an error, more than 1.0%: RuntimeError: CUDA out of memory"


def test_a_withheld_score_says_what_was_raised_most_often() -> None:
    rows = [{"error": f"TemplateError: {'x' * 400}" if i % 3 else "KeyError: 7"} for i in range(9)]
    rows = [{"gold": "A", "predicted": "", "correct": False, "strict": False, "valid": False, **r} for r in rows]
    why = KINDS["choice"]["official"].summarise("toy", rows).withheld
    assert why.startswith("9 of 9 items raised an error, more than 1.0%: 6 of them TemplateError: xxx")
    assert len(why) < 400


def test_a_solution_that_raised_withholds_the_mean() -> None:
    """It has no likelihood: left out, the mean would be over other items; as 0 it would be the best of all."""
    rows = [{"value": -1.5, "gold": "", "predicted": "", "correct": False}] * 999
    rows.append({"value": None, "gold": "", "predicted": "", "correct": False, "error": "RuntimeError: x"})
    found = KINDS["solution"]["likelihood"].summarise("toy", rows)
    assert (found.score, found.errors) == (None, 1)
    assert "1 of 1000 items raised an error" in found.withheld


LOGGED = [
    ("twice", lambda rows: [*rows[:9], *rows[:9]]),
    ("one left out", lambda rows: [*rows[:3], *rows[4:9]]),
    ("too many", lambda rows: [*rows, rows[-1]]),
    ("not samples", lambda rows: [1, 2, 3]),
]


@pytest.mark.parametrize(("what", "damage"), LOGGED, ids=[name for name, _ in LOGGED])
def test_a_log_that_is_not_one_evaluation_is_refused(
    what: str, damage: Any, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "score", lambda m, t, some, *rest: iter([[[0.0, -1.0, -2.0]] * len(some)]))
    log = tmp_path / "toy.jsonl"
    first = evaluate(None, None, items("choice"), "likelihood", tiny_config, log, "me")
    header, *rows = read_lines(log)
    write_lines(log, [header, *rows[:7]])
    assert evaluate(None, None, items("choice"), "likelihood", tiny_config, log, "me") == first
    write_lines(log, [header, *damage(rows)])
    before = log.read_bytes()
    with pytest.raises(CorruptFileError, match="Move the file away"):
        evaluate(None, None, items("choice"), "likelihood", tiny_config, log, "me")
    assert log.read_bytes() == before


CHANGES = {"eval__prompt": "official", "prompt__input": "instruction"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_log_made_with_other_settings_or_code_is_started_anew(
    change: str, settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.evaluation import run as evaluation

    asked: list[int] = []

    def score(model: Any, tokenizer: Any, some: Any, *rest: Any) -> Any:
        asked.append(len(some))
        return iter([[[0.0, -1.0, -2.0]] * len(some)])

    monkeypatch.setattr(likelihood, "score", score)
    log = tmp_path / "toy.jsonl"
    same, other = settings().config, settings(**{change: CHANGES[change]}).config
    for config in (same, same, other):
        evaluate(None, None, items("choice"), "likelihood", config, log, "me")
    monkeypatch.setattr(evaluation, "code_sha256", lambda: "other code")
    evaluate(None, None, items("choice"), "likelihood", other, log, "me")
    assert asked == [40, 40, 40]
