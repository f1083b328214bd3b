"""Published submissions become rows from their generations; what those do not give is said."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.board.build import board
from fedtune.board.published import read
from fedtune.board.store import write_entry
from fedtune.cli import app
from fedtune.evaluation import again, programs, sandbox
from fedtune.evaluation.published import scored
from fedtune.results.entry import unpacked
from fedtune.types import CorruptFileError, DataError

ROWS = [
    {"gold": "A", "output": "A"},
    {"gold": "B", "output": "The"},
    {"gold": "C", "output": "C"},
    {"gold": "A", "output": "B"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(*changes: dict[str, Any]) -> Path:
        (tmp_path / "g.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
        base = {
            "participant": "somebody",
            "domain": "medical",
            "task": "medqa",
            "model": "Qwen/Qwen2.5-7B",
            "generations_file": "g.jsonl",
            "references_file": None,
            "published_score": 0.5,
            "n": 4,
        }
        (tmp_path / "index.json").write_text(json.dumps([{**base, **c} for c in changes]))
        facts = {
            "somebody": {
                "repo": "github.com/some/body",
                "communication": [{"model": "Qwen/Qwen2.5-7B", "used_mb_max": 2.0}],
            }
        }
        (tmp_path / "facts.json").write_text(json.dumps(facts))
        return tmp_path

    return make


def test_a_score_that_its_generations_give_is_rescored(folder: Callable[..., Path]) -> None:
    (entry,) = read(folder({}))
    assert (entry.state, entry.reasons) == ("re-scored", [])
    assert entry.unranked == [
        "medqa: 4 items, the whole set has 1,273",
        "official: not evaluated on pubmedqa, medmcqa, careqa",
    ]
    found = entry.main.scores[0]
    assert (found.score, found.n, found.strict) == (0.5, 4, 0.5)
    answers = entry.answers["federated/medqa/official"]
    assert unpacked(answers.bits, answers.n).tolist() == [True, False, True, False]
    assert entry.costs.bytes_up + entry.costs.bytes_down == 2 * 1024**2
    assert entry.link == "https://github.com/some/body"


def test_another_score_is_flagged_and_an_impossible_one_is_named(folder: Callable[..., Path]) -> None:
    (entry,) = read(folder({"published_score": 0.75}))
    assert entry.state == "flagged"
    assert entry.reasons == ["medqa: published as 0.75, its generations give 0.5"]
    more = {"task": "pubmedqa", "generations_file": None, "published_score": 0.5994, "n": 500}
    (entry,) = read(folder({}, more))
    assert "pubmedqa: 0.5994 is not k/500 for any whole k" in entry.reasons
    assert "official: not evaluated on pubmedqa, medmcqa, careqa" in entry.unranked
    assert entry.claims == {"medqa": 0.5, "pubmedqa": 0.5994}


def test_the_runs_of_one_participant_are_rows_of_their_own(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Four runs on one base model, two of them with another method: four rows, each with its own generations."""
    names = ("rank 8", "rank 16", "rank 8, FlexLoRA", "rank 16, FlexLoRA")
    root = folder(*({"run": n, "generations_file": f"g{i}.jsonl"} for i, n in enumerate(names)))
    for i in range(4):
        rows = [{"gold": "A", "output": "A" if k <= i else "B"} for k in range(4)]
        (root / f"g{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = list(read(root))
    assert sorted((e.title, e.main.scores[0].score) for e in found) == sorted(
        (f"published submission {n}", (i + 1) / 4) for i, n in enumerate(names)
    )
    assert all(len(e.main.scores) == 1 for e in found)
    for entry in found:
        write_entry(tmp_path / "store", entry)
    assert len(board(tmp_path / "store")["rows"]) == 4


def test_runs_that_are_not_told_apart_are_not_averaged(folder: Callable[..., Path]) -> None:
    with pytest.raises(CorruptFileError, match="medqa twice; tell its runs apart by `run`"):
        list(read(folder({}, {})))


def test_a_broken_index_is_named(folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="has no generations for medical"):
        list(read(folder({"generations_file": None})))
    with pytest.raises(CorruptFileError, match="unknown task 'medqq'; did you mean"):
        list(read(folder({"task": "medqq"})))
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="is not a list"):
        list(read(tmp_path))


def test_from_the_command_line_to_a_flagged_row(folder: Callable[..., Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = CliRunner().invoke(app, ["board", "import-published", str(folder({})), "--store", str(store)])
    assert done.exit_code == 0, done.output
    (path,) = store.rglob("*.json")
    flagged = CliRunner().invoke(app, ["board", "flag", str(path), "--reason", "trained on the test set"])
    assert flagged.exit_code == 0
    CliRunner().invoke(app, ["board", "build", str(store), "--out", str(tmp_path / "site")])
    data = json.loads((tmp_path / "site/board.json").read_text())
    assert (data["rows"][0]["state"], data["rows"][0]["reasons"]) == ("flagged", ["trained on the test set"])
    assert data["ranks"] == {}
    refused = CliRunner().invoke(app, ["board", "flag", str(path), "--reason", "<b>x</b>"])
    assert "write plain text" in str(refused.exception)


OWN = "assert True is not None"


@pytest.fixture
def code(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of a whole set that pass only the tests their participant published with them."""

    def run(texts: Sequence[str], tests: Sequence[str], *_: Any) -> list[sandbox.Outcome]:
        return [sandbox.Outcome("passed" if t == OWN else "wrong", compiled=True, detail="") for t in tests]

    monkeypatch.setattr(programs, "run", run)
    change = {"domain": "code", "task": "humaneval", "published_score": 1.0, "n": 164}
    root = folder({**change, "generations_file": "g.json", "references_file": "r.json"})
    (root / "g.json").write_text(json.dumps([["x = 1"]] * 164))
    (root / "r.json").write_text(json.dumps([OWN] * 164))
    return root


def test_programs_are_run_with_the_tests_of_the_set_and_not_with_their_own(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [SimpleNamespace(gold_answer="assert f() == 2")] * 164
    monkeypatch.setattr(again, "tests_at_hand", lambda task: known)
    (entry,) = read(code)
    assert (entry.main.scores[0].score, entry.state) == (0.0, "flagged")
    assert entry.reasons == ["humaneval: published as 1, its generations give 0"]
    (code / "g.json").rename(code / "generations.json")
    (code / "r.json").rename(code / "references.json")
    assert scored("humaneval", code / "generations.json", "official")[0].score == 0.0


def test_programs_run_with_their_own_tests_have_no_rank(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(task: Any) -> Any:
        raise DataError("no folder of sets")

    monkeypatch.setattr(again, "tests_at_hand", missing)
    (entry,) = read(code)
    why = "run with the tests published beside them; those of the set are not at hand: no folder of sets"
    assert (entry.main.scores[0].score, entry.state) == (1.0, "reported")
    assert entry.unranked[0] == f"humaneval: {why}"
    done = CliRunner().invoke(
        app, ["score", "humaneval", str(code / "g.json"), "--references", str(code / "r.json"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert "humaneval: not a score of the known set: run with the tests of" in done.stderr


def test_a_score_of_a_part_of_a_set_says_so(folder: Callable[..., Path]) -> None:
    done = CliRunner().invoke(app, ["score", "medqa", str(folder({}) / "g.jsonl")])
    assert "medqa: not a score of the known set: 4 items, the whole set has 1,273" in done.stderr


def test_the_published_submissions_start_a_board(benchmark_data: Path) -> None:
    entries = list(read(benchmark_data / "conformance", skipped=("code",)))
    assert len(entries) >= 5
    assert {e.state for e in entries} == {"re-scored"}
    for entry in entries:
        for score in entry.main.scores:
            assert score.score == pytest.approx(entry.claims[score.task], abs=1e-9)
    assert any(e.costs.bytes_up for e in entries)
