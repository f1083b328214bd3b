"""Data files damaged at random: what comes is rows, a report on rows, or a named error; never a traceback."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Config
from fedtune.data import files, partition
from fedtune.data.check import check, require
from fedtune.domains import DOMAINS, TASKS
from fedtune.evaluation import items, programs, published
from fedtune.io import read_lines
from fedtune.types import FedtuneError
from tests.faults.mutate import copies

COPIES = 100
TRAIN = [
    {"instruction": f"say {i}", "input": "it – so", "output": ("yes", "no")[i % 2], "when": None} for i in range(6)
]


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": _jsonl,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".jsonl.gz": lambda rows: gzip.compress(_jsonl(rows), mtime=0),
    ".csv": _csv,
    ".parquet": _parquet,
}


def _outcomes(path: Path, whole: bytes, read: Callable[[], object]) -> tuple[int, int]:
    """Read damaged copies; return how many were read and how many refused. Any other end is a failure."""
    fine = refused = 0
    for _, data in copies(whole, COPIES):
        path.write_bytes(data)
        try:
            read()
            fine += 1
        except FedtuneError:
            refused += 1
    return fine, refused


@pytest.mark.parametrize("ending", FORMATS)
def test_damaged_training_files_end_in_rows_reports_or_a_named_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"finance_a{ending}"

    def read() -> None:
        checked = check(files.read_rows(path), {}, "output")
        for row in require(checked, "a"):
            answers = [row.output, *(answer for _, answer in row.turns)]
            texts = [row.instruction, row.input, row.group, *chain.from_iterable(row.turns), *row.columns.values()]
            "".join([*answers, *texts]).encode()
            assert any(answer.strip() for answer in answers)
        "\n".join(checked.lines()).encode("utf-8", "backslashreplace")
        partition.partition(checked.rows, "shards:1", 2, 1)

    fine, refused = _outcomes(path, FORMATS[ending](TRAIN), read)
    assert min(fine, refused) > 0


SETS: dict[str, list[dict[str, Any]]] = {
    "fpb": [{"sentence": f"s {i}", "label": i % 3} for i in range(5)],
    "pubmedqa": [{"CONTEXTS": ["a", "b"], "QUESTION": f"q {i}", "final_decision": "yes"} for i in range(5)],
    "medqa": [{"question": f"q {i}", "options": [{"value": o} for o in "wxyz"], "answer": "x"} for i in range(5)],
    "mbpp": [{"text": f"t {i}", "test_list": ["assert f(1) == 1"], "task_id": i} for i in range(5)],
}


@pytest.mark.parametrize(("task", "ending"), [(t, e) for t in SETS for e in FORMATS if e != ".csv" or t == "fpb"])
def test_damaged_evaluation_sets_end_in_items_or_a_named_error(tmp_path: Path, task: str, ending: str) -> None:
    domain = next(d.name for d in DOMAINS.values() if TASKS[task] in d.tasks)
    made = Config.model_validate({"domain": domain, "data": {"source": "folder", "path": str(tmp_path)}})
    path = tmp_path / f"{TASKS[task].file}{ending}"

    def read() -> None:
        for item in items.load(TASKS[task], made, 3).items:
            assert item.gold_answer.strip()
            (item.prompt + item.question + "".join(item.answers)).encode()

    fine, refused = _outcomes(path, FORMATS[ending](SETS[task]), read)
    assert min(fine, refused) > 0


@pytest.mark.parametrize("task", ["mmlu_stem", "pubmedqa", "fpb"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz"])
def test_damaged_generations_end_in_a_score_or_a_named_error(tmp_path: Path, task: str, ending: str) -> None:
    gold = {"mmlu_stem": "B", "pubmedqa": "no", "fpb": "neutral"}[task]
    rows = [{"gold": gold, "output": f"{gold} {i}"} for i in range(5)]

    def read() -> None:
        found = published.scored(task, tmp_path / f"x{ending}", "official")[0]
        assert found.score is not None
        assert 0 <= found.score <= 1

    fine, refused = _outcomes(tmp_path / f"x{ending}", FORMATS[ending](rows), read)
    assert min(fine, refused) > 0


def test_damaged_programs_and_tests_end_in_programs_with_tests_or_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def note(pairs: Any, tests: list[str], *rest: Any) -> list[programs.Outcome]:
        ran.extend(tests)
        return [programs.Outcome("passed")] * len(pairs)

    monkeypatch.setattr(programs, "run", note)
    made = tmp_path / "generations.json"
    made.write_text(json.dumps([["def f(x): return x"]] * 3))
    tests = json.dumps(["assert f(1) == 1", ["assert f(1) == 1"], {"test_list": ["assert f(1) == 1"]}]).encode()
    path = tmp_path / "references.json"
    fine, refused = _outcomes(path, tests, lambda: published.scored("humaneval", made, "official"))
    assert min(fine, refused) > 0
    assert all(text.strip() for text in ran)
    path.write_bytes(tests)
    _outcomes(made, made.read_bytes(), lambda: published.scored("humaneval", made, "official"))


def test_damaged_logs_end_in_rows_or_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    fine, refused = _outcomes(path, _jsonl(TRAIN), lambda: read_lines(path))
    torn, _ = _outcomes(path, _jsonl(TRAIN), lambda: read_lines(path, torn_tail=True))
    assert 0 < fine < torn
    assert refused > 0
