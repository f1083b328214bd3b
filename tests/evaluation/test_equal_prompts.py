"""Official questions with equal prompts: all get the last one's output, and all that reads a log agrees about it."""

import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.board.entries import _answers
from fedtune.board.samples import recomputed
from fedtune.cli.tables import paired
from fedtune.config import Config
from fedtune.config.schema import ModelSettings
from fedtune.domains import TASKS
from fedtune.domains.base import Item
from fedtune.evaluation import metrics, official
from fedtune.evaluation.extract import bare
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.metrics import as_counted, mean_score
from fedtune.evaluation.run import evaluate
from fedtune.evaluation.scorers import KINDS
from fedtune.io import read_lines, write_lines
from fedtune.models.load import LoadedModel
from fedtune.models.load import load as load_model
from fedtune.results.entry import unpacked
from fedtune.results.schema import Arm


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelSettings(name=str(tiny_folder)))


def _answers_in_turn(texts: Sequence[str]) -> Callable[..., Iterator[list[str]]]:
    """Stand in for the official generation: the texts one after the other, whatever is asked."""
    left = iter(texts)
    return lambda model, tokenizer, items: iter([[next(left) for _ in items]])


def test_equal_prompts_get_the_last_output_as_in_the_official_table(
    model: LoadedModel, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gold is A, A, B, A; the first, third and fourth question are the same one."""
    same, other = Item("same", "q", ("A", "B"), 0), Item("other", "q", ("A", "B"), 0)
    items = TaskItems(TASKS["medqa"], (same, other, replace(same, gold=1), same), (2, 5, 6, 9), "hash")
    monkeypatch.setattr(official, "choose", _answers_in_turn("BABA"))
    log = tmp_path / "evals/base/medqa.official.jsonl"
    score = evaluate(model.model, model.tokenizer, items, "official", tiny_config, log, "me")
    assert score.score == 0.75
    rows = read_lines(log)[1:]
    assert [r["output"] for r in rows] == list("BABA"), "the log keeps what was generated"
    assert [r.get("same_prompt_as") for r in rows] == [9, None, 9, None]
    assert [r["predicted"] for r in as_counted(rows)] == list("aaaa")
    assert [r["correct"] for r in as_counted(rows)] == [True, True, False, True]


def test_whatever_is_made_from_a_log_agrees_with_the_run_about_equal_prompts(
    model: LoadedModel, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = Item("same", "q", ("A", "B"), 0)
    items = TaskItems(TASKS["medqa"], (same, same), (0, 1), "hash")
    monkeypatch.setattr(official, "choose", _answers_in_turn("BA"))
    log = tmp_path / "evals/base/medqa.official.jsonl"
    score = evaluate(model.model, model.tokenizer, items, "official", tiny_config, log, "me")
    assert score.score == 1.0
    assert paired(log, log)[0] == [1.0, 1.0]
    assert mean_score([score], [log]).interval == (1.0, 1.0)
    arm = Arm(name="base", scores=[score])
    assert [unpacked(a.bits, a.n).tolist() for _, a in _answers(tmp_path, arm)] == [[True, True]]
    log.with_suffix(".jsonl.gz").write_bytes(gzip.compress(log.read_bytes()))
    log.unlink()  # as a submission has it
    assert list(recomputed(tmp_path, arm, score)) == []


def test_a_log_from_before_samples_named_equal_prompts_is_taken_up(
    model: LoadedModel, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = Item("same", "q", ("A", "B"), 0)
    items = TaskItems(TASKS["medqa"], (same, same), (0, 1), "hash")
    monkeypatch.setattr(official, "choose", _answers_in_turn("BA"))
    args = (model.model, model.tokenizer, items, "official", tiny_config, tmp_path / "log", "me")
    score = evaluate(*args)
    header, *rows = read_lines(tmp_path / "log")
    older = [{k: v for k, v in row.items() if k != "same_prompt_as"} for row in rows]
    assert [r["correct"] for r in as_counted(older)] == [False, True], "nothing says that the prompts are equal"
    write_lines(tmp_path / "log", [header, *older])
    assert evaluate(*args) == score
    assert read_lines(tmp_path / "log")[1:] == rows


def test_an_item_that_raised_neither_gives_nor_takes_an_output() -> None:
    good = {"gold": "A", "answers": ["A", "B"], "output": "A", "predicted": "a", "correct": True, "strict": True}
    bad = {"gold": "A", "predicted": "", "correct": False, "strict": False, "valid": False, "error": "x"}
    for first, last in ((good, bad), (bad, good)):
        rows = [{"i": 0, **first, "same_prompt_as": 1}, {"i": 1, **last}]
        assert as_counted(rows) == rows


@pytest.mark.parametrize(("kind", "answers"), [("choice", ("A", "B", "C", "D")), ("boolean", ("yes", "no", "maybe"))])
@pytest.mark.parametrize("gold", [0, 1, 2])
@pytest.mark.parametrize("output", ["A", " a.", "Based on", "yes", "yesno", "maybe", "maybe.", "", "\n## no", "é"])
def test_a_sample_counts_as_if_the_last_output_were_its_own(
    kind: str, answers: tuple[str, ...], gold: int, output: str
) -> None:
    item = Item("same", "q", answers, gold)
    scorer = KINDS[kind]["official"]
    first, last = scorer.sample(item, "C"), scorer.sample(replace(item, gold=0), output)
    counted = as_counted([{"i": 0, **first, "same_prompt_as": 1}, {"i": 1, **last}])
    assert counted == [{"i": 0, **scorer.sample(item, output), "same_prompt_as": 1}, {"i": 1, **last}]


def test_an_output_that_very_many_samples_name_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(metrics, "bare", lambda output: read.append(output) or bare(output))
    sample = {"gold": "A", "predicted": "b", "output": "B.", "answers": ["A", "B"], "correct": False}
    rows = [{**sample, "i": i, "same_prompt_as": 199} for i in range(199)]
    rows += [{**sample, "i": 199, "output": " (a)", "predicted": "a", "same_prompt_as": 199}]
    counted = as_counted([*rows, {**sample, "i": 200}])
    assert read == [" (a)"]
    assert [(r["correct"], r.get("strict"), r.get("valid")) for r in counted[:200]] == [(True, True, True)] * 200
    assert counted[200] == {**sample, "i": 200}
