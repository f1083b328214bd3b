"""Kind, mode and metric are asked about in the scorers and nowhere else; a kind of one's own is one file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedtune
from fedtune.board.samples import recomputed
from fedtune.cli import app
from fedtune.config import Config
from fedtune.config.schema import EvalSettings
from fedtune.domains import TASKS, Item, Task
from fedtune.evaluation import scorers
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.run import evaluate
from fedtune.evaluation.scorers import KINDS, Scorer
from fedtune.io import read_lines, write_lines
from fedtune.results.schema import Arm, Score
from fedtune.types import ConfigError

ROOT, PACKAGE = Path(__file__).parents[2], Path(fedtune.__file__).parent
ALL = [(kind, word, scorer) for kind, modes in KINDS.items() for word, scorer in modes.items()]
WORDS = {word for kind, mode, scorer in ALL for word in (kind, mode, scorer.mode, scorer.metric.name)}


def _words(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)} & WORDS


def _asks(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that compare something with a kind's, a mode's or a metric's word, or look it up by one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            named = isinstance(node.left, ast.Attribute) and node.left.attr == "prompt"  # `eval.prompt` has such a word
            if not named and any(map(_words, [node.left, *node.comparators])):
                yield node.lineno
        elif isinstance(node, ast.Dict):
            if any(_words(key) for key in node.keys if key):
                yield node.lineno
        elif isinstance(node, ast.match_case) and _words(node.pattern):
            yield node.pattern.lineno


def test_only_scorers_ask_for_a_kind_a_mode_or_a_metric() -> None:
    assert {"choice", "likelihood", "greedy", "pass@1"} <= WORDS
    files = [p for p in PACKAGE.rglob("*.py") if PACKAGE / "evaluation/scorers" not in p.parents]
    found = {str(p.relative_to(PACKAGE)): [*_asks(ast.parse(p.read_text("utf-8")))] for p in files}
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "code",
    [
        *("task.kind == 'program'", "kind in ('choice', 'boolean')", "score.metric != 'nats_per_token'"),
        *("{'sentiment': 1}[kind]", "'official' in config.eval.modes"),
        "match kind:\n case 'solution':\n  pass",
    ],
)
def test_asking_for_one_is_seen(code: str) -> None:
    assert [*_asks(ast.parse(code))]


def test_every_task_has_scorers_and_every_mode_of_a_kind_its_own_name() -> None:
    assert {task.kind for task in TASKS.values()} == set(KINDS)
    for modes in KINDS.values():
        assert len({scorer.mode for scorer in modes.values()}) == len(modes)


@pytest.mark.parametrize(("kind", "word", "scorer"), ALL)
def test_what_a_scorer_uses_are_settings_of_eval(kind: str, word: str, scorer: Scorer) -> None:
    assert scorer.uses <= EvalSettings.model_fields.keys()
    assert scorers.metric(scorer.metric.name) == scorer.metric


SUMS = (("What is 2 and 2?", "4"), ("What is 9 less 2?", "7"), ("Half of 9?", "4.5"))
WRITTEN = {"What is 2 and 2?": "It is 4.", "What is 9 less 2?": "9 less 2: 1,000", "Half of 9?": "I do not know"}


def the_page() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-task.md").read_text("utf-8"), re.S)
    return block


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> TaskItems:
    """Make the kind on the page, and a task of it that a model has answered."""
    page: dict[str, Any] = {"__name__": "page"}
    exec(compile(the_page(), "add-a-task.md", "exec"), page)
    monkeypatch.setitem(KINDS.own, "number", page["NUMBERS"])
    task = Task("sums", "number", lambda row: None)
    monkeypatch.setitem(TASKS.own, "sums", task)

    def written(model: Any, tokenizer: Any, prompts: list[str], *rest: Any) -> Iterator[list[list[str]]]:
        yield [[WRITTEN[prompt]] for prompt in prompts]

    monkeypatch.setattr("fedtune.evaluation.generate.complete", written)
    items = tuple(Item(asked, asked, (gold,), 0) for asked, gold in SUMS)
    return TaskItems(task, items, (0, 1, 2), "h" * 64)


def test_the_kind_on_the_page_is_evaluated_shown_and_checked(
    sums: TaskItems, tiny_config: Config, tmp_path: Path
) -> None:
    log = tmp_path / "evals/federated/sums.greedy.jsonl"
    score = evaluate(None, None, sums, "greedy", tiny_config, log, "me")
    assert (score.score, score.strict, score.valid_rate) == (1 / 3, 1 / 3, 2 / 3)
    assert score.trivial["majority"] == pytest.approx(1 / 3)
    header, *rows = read_lines(log)
    assert [row["predicted"] for row in rows] == ["4", "1000", ""]
    arm = Arm(name="federated", scores=[score])
    assert list(recomputed(tmp_path, arm, score)) == []
    write_lines(log, [header, rows[0], {**rows[1], "predicted": "7", "correct": True, "strict": True}, rows[2]])
    (said,) = recomputed(tmp_path, arm, score)
    assert said == "1 samples are judged wrongly; the first: item 1: predicted is '7', it gives '1000'"


def test_a_score_in_a_mode_that_its_task_has_none_of_is_refused(sums: TaskItems, tmp_path: Path) -> None:
    odd = Score(task="sums", mode="likelihood", n=3, score=1.0)
    assert list(recomputed(tmp_path, Arm(name="federated", scores=[odd]), odd)) == [
        "is of no mode that this task is scored in"
    ]


def test_a_kind_without_scorers_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"task odd(.|\n)*kind = 'choise'.*has no scorers.*choice"):
        scorers.of(Task("odd", "choise", lambda row: None))


def test_a_published_score_is_shown_with_what_its_metric_adds(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    write_lines(file, [{"gold": "A", "output": "A"}, {"gold": "B", "output": "The"}])
    said = CliRunner().invoke(app, ["score", "medqa", str(file)]).stdout
    assert "medqa (official, accuracy): 0.5000, 95 % interval 0.0000 to 1.0000, n = 2\n" in said
    assert "valid answers: 50.0%; always the majority class: 0.5000\n" in said
