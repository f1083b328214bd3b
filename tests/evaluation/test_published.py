import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.evaluation.programs import MOST_BYTES
from fedtune.evaluation.published import scored
from fedtune.types import ConfigError, CorruptFileError

CHOICES = [
    {"prompt": "p", "gold": "A", "output": "A"},
    {"prompt": "p", "gold": "B", "output": "Based"},
    {"prompt": "p", "gold": "C", "output": "The"},
    {"prompt": "p", "gold": "A", "output": "D"},
]


@pytest.mark.parametrize("array", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_array_or_lines_plain_or_gzipped(tmp_path: Path, array: bool, zipped: bool) -> None:
    text = json.dumps(CHOICES) if array else "\n".join(map(json.dumps, CHOICES))
    path = tmp_path / "generation.jsonl"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    found = scored("medqa", path, "official")[0]
    assert (found.n, found.score, found.valid_rate, found.strict) == (4, 0.5, 0.5, 0.25)
    assert found.trivial == {"majority": 0.5, "always-A": 0.5, "always-B": 0.25, "always-C": 0.25}
    assert scored("medqa", path, "strict")[0].score == 0.25


def test_finance_files_hold_labels_or_texts(tmp_path: Path) -> None:
    labels = [
        {"context": "c", "new_target": "positive", "new_out": "positive"},
        {"new_target": "neutral", "new_out": "negative"},
    ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(labels))
    found = scored("fpb", path, "official")[0]
    assert (found.score, found.valid_rate, found.strict) == (0.5, None, None)
    assert found.macro_f1 == pytest.approx(1 / 3)
    with pytest.raises(CorruptFileError, match="only --mode official"):
        scored("fpb", path, "strict")
    path.write_text(
        json.dumps([{"target": "neutral", "out_text": "dunno"}, {"target": "neutral", "out_text": "neutral"}])
    )
    assert (scored("fpb", path, "official")[0].score, scored("fpb", path, "strict")[0].score) == (1.0, 0.5)


def test_errors_name_the_row_the_column_and_the_nearest_task(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([CHOICES[0], {"prompt": "p", "gold": "A"}]))
    with pytest.raises(CorruptFileError, match="row 2 lacks output; its columns are prompt, gold"):
        scored("medqa", path, "official")
    path.write_text(json.dumps([{f"column {i}": 1 for i in range(10**5)}]))
    with pytest.raises(CorruptFileError, match=r"row 1 lacks gold and output; .* and 99988 more$"):
        scored("medqa", path, "official")
    path.write_text("[]")
    with pytest.raises(CorruptFileError, match="no rows"):
        scored("medqa", path, "official")
    with pytest.raises(ConfigError, match='did you mean "mmlu_stem"'):
        scored("mmlu_stm", path, "official")


def test_every_published_score_comes_out_exactly(benchmark_data: Path) -> None:
    root = benchmark_data / "conformance"
    checked = 0
    for entry in json.loads((root / "index.json").read_text()):
        if entry["domain"] == "code" or not entry["generations_file"]:
            continue
        found = scored(entry["task"], root / entry["generations_file"], "official")[0]
        assert found.n == entry["n"]
        assert found.score == pytest.approx(entry["published_score"], abs=1e-12), entry["generations_file"]
        checked += 1
    assert checked == 16


def test_scoring_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(CHOICES))
    code = (
        "import sys; sys.argv = ['fedtune', 'score', 'medqa', sys.argv[1], '--json']\n"
        "from fedtune.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'flwr', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    assert json.loads(first)["score"] == 0.5
    assert second == "[]"


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("mmlu_stem", {"gold": ["B"], "output": "B"}),
        ("mmlu_stem", {"gold": 1, "output": "B"}),
        ("mmlu_stem", {"gold": True, "output": "B"}),
        ("mmlu_stem", {"gold": "BC", "output": "B"}),
        ("mmlu_stem", {"gold": "", "output": ""}),
        ("pubmedqa", {"gold": "true", "output": "yes"}),
        ("fpb", {"target": "2", "out_text": "positive"}),
        ("fpb", {"new_target": 2, "new_out": "positive"}),
    ],
)
def test_a_right_answer_that_no_output_can_be_is_refused(tmp_path: Path, task: str, row: dict[str, object]) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(CorruptFileError, match=r"row 1: gold is .*, not one of"):
        scored(task, path, "official")


def test_an_output_that_is_not_a_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"gold": "B", "output": ["B"]}]))
    with pytest.raises(CorruptFileError, match="row 1: output is a list, not a text"):
        scored("mmlu_stem", path, "official")


@pytest.mark.parametrize("task", ["fpb", "mmlu_stem", "humaneval"])
def test_no_file_takes_more_than_its_bounds(tmp_path: Path, task: str) -> None:
    device, fifo, bomb = (tmp_path / name for name in ("device.jsonl", "fifo.jsonl", "bomb.jsonl.gz"))
    device.symlink_to("/dev/zero")
    os.mkfifo(fifo)
    bomb.write_bytes(gzip.compress(b'{"gold":"A","output":"A"}\n' * (MOST_BYTES // 26 + 1), 9))
    assert bomb.stat().st_size < 200_000
    for path, said in (
        (device, "neither a file"),
        (fifo, "neither a file"),
        (bomb, "unzipped, more than the 67108864"),
    ):
        with pytest.raises(CorruptFileError, match=said):
            scored(task, path, "official")
    small = tmp_path / "small.jsonl"
    small.write_text("{}\n" * 100_001)
    with pytest.raises(CorruptFileError, match=r"100001 lines, it may have 100000|Extra data"):
        scored(task, small, "official")
