"""Every example on the pages runs: shell commands on the tiny model, Python as it stands.

A block that cannot run here is preceded by `<!-- not run: why -->`, and one that another test runs by
`<!-- run by: tests/file.py::test -->`; a block without a language is output or a drawing.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.board.submit import pack
from fedtune.cli import app
from fedtune.config import Settings
from fedtune.experiment.run import run
from fedtune.io import read_json, write_json
from tests.test_docs import PAGES, ROOT, functions

BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^>]*) -->\n+)?(?P<pad> *)```(?P<kind>\w+)\n(?P<text>.*?)^ *```$", re.M | re.S)
KINDS = {"sh", "python", "toml", "json"}
TINY = ["--model", "model", "--data", "FOLDER"]
QUICK = [
    f"-s{s}"
    for s in (
        "federation.rounds=1",
        "train.max_steps=2",
        "eval.limit=2",
        "eval.base=false",
        'eval.modes=["likelihood"]',
    )
]


@dataclass(frozen=True)
class Block:
    page: Path
    kind: str
    text: str
    mark: str

    @property
    def runs(self) -> bool:
        return not self.mark.startswith(("not run: ", "run by: "))


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text("utf-8"))
    return [Block(page, m["kind"], textwrap.dedent(m["text"]), m["mark"] or "") for m in found]


ALL = [block for page in PAGES for block in blocks(page)]
NAMES = [f"{b.page.relative_to(ROOT)}:{b.text.strip().splitlines()[0][:40]}" for b in ALL]


@pytest.mark.parametrize("block", ALL, ids=NAMES)
def test_a_block_has_a_known_language_and_one_that_is_not_run_here_a_reason(block: Block) -> None:
    assert block.kind in KINDS
    if block.mark.startswith("run by: "):
        file, _, function = block.mark.removeprefix("run by: ").partition("::")
        assert function in functions(ROOT / file)
    else:
        assert block.runs or len(block.mark) > 20


# --- Python ---------------------------------------------------------------------------------------------------------


PYTHON = {page: [b for b in blocks(page) if b.kind == "python" and b.runs] for page in PAGES}


@pytest.mark.parametrize("page", [p for p in PAGES if PYTHON[p]], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_python_of_a_page_runs_from_its_first_line_to_its_last(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": f"example_{page.stem}"}
    for block in PYTHON[page]:
        exec(compile(block.text, str(page), "exec"), names)


# --- the shell ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(
    settings: Callable[..., Settings], data_folder: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with all that the examples' words stand for: runs, adapters, a submission, generations, data."""
    root = tmp_path_factory.mktemp("examples")
    shutil.copytree(data_folder, root / "FOLDER")
    _add_sets(root / "FOLDER")
    _add_published(root)
    short = {"federation": {"clients": 2, "rounds": 1}, "eval": {"base": True, "limit": 4}}
    runs = [run(settings(seed=seed, **short), root / f"RUN{seed}")[0] for seed in (1, 2, 3)]
    pack(runs, root / "submission", "a team")
    shutil.copytree(runs[0] / "adapter", root / "ADAPTER")
    shutil.copytree(runs[0], root / "runs/cut-off")
    write_json(root / "runs/cut-off/manifest.json", {**read_json(runs[0] / "manifest.json"), "status": "cancelled"})
    shutil.copytree(ROOT / "results", root / "results")
    (root / "package").mkdir()
    (root / "package/module.py").write_text(FUNCTION)
    (root / "model").symlink_to(tiny_folder)
    return root


def _lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _add_sets(folder: Path) -> None:
    """Training rows of medicine, and two items of every benchmark set of both domains."""
    cards = [{"instruction": "Answer.", "input": f"Is {n} odd?", "output": "yes" if n % 2 else "no"} for n in range(24)]
    _lines(folder / "train/medical_toy.jsonl", cards)
    options = {**{f"op{letter}": letter for letter in "abcd"}, **{f"op{n}": str(n) for n in range(1, 5)}}
    sets: dict[str, list[dict[str, object]]] = {
        "finance/fiqa_test": [{"sentence": "Up.", "sentiment_score": s, "format": "post"} for s in (0.5, -0.5)],
        "finance/tfns_validation": [{"text": "Down.", "label": label} for label in (0, 1)],
        "medical/pubmedqa_test": [{"CONTEXTS": ["x"], "QUESTION": "y?", "final_decision": a} for a in ("yes", "no")],
        "medical/medmcqa_validation": [{"question": "Which?", "cop": n, **options} for n in (0, 1)],
        "medical/careqa_en_test": [{"question": "Which?", "cop": n, **options} for n in (1, 2)],
        "medical/medqa_4options_test": [
            {"question": "Which?", "options": [{"key": k, "value": k} for k in "ABCD"], "answer": a} for a in "AB"
        ],
    }
    for name, rows in sets.items():
        _lines(folder / f"eval/{name}.jsonl", rows)


def _add_published(root: Path) -> None:
    """Generations of somebody's, as files to score and as a folder to import."""
    rows: list[dict[str, object]] = [{"gold": "A", "output": "A"}, {"gold": "B", "output": "The"}]
    (root / "GENERATIONS.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    program, test = "def f():\n    return 1\n", "assert f() == 1\n"
    (root / "generations.json.gz").write_bytes(gzip.compress(json.dumps([[program]]).encode()))
    (root / "references.json.gz").write_bytes(gzip.compress(json.dumps([test]).encode()))
    _lines(root / "FOLDER/g.jsonl", rows)
    facts = {"participant": "somebody", "domain": "medical", "task": "medqa", "model": "organisation/name", "n": 2}
    files = {"generations_file": "g.jsonl", "references_file": None, "published_score": 0.5}
    write_json(root / "FOLDER/index.json", [{**facts, **files}])


FUNCTION = """
def function(states, weights):
    return {name: sum(w * s[name] for s, w in zip(states, weights)) / sum(weights) for name in states[0]}
"""


STUB = """#!/bin/sh
{ for word in "${0##*/}" "$@"; do printf '%s\\0' "$word"; done; printf '\\n\\0'; } >> "$COMMANDS"
"""


def commands(text: str, folder: Path) -> list[list[str]]:
    """Return the commands that the shell makes of a block: programs are stubs that write down what they are called with."""
    names = ["fedtune", "make", "python3", "python", ".venv/bin/fedtune", ".venv/bin/pip", ".venv/bin/python"]
    for name in names:
        stub = folder / "stubs" / name if "/" not in name else folder / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
    (folder / ".venv/bin/activate").touch()
    log = folder / "commands"
    log.unlink(missing_ok=True)
    around = {**os.environ, "PATH": f"{folder / 'stubs'}:{os.environ['PATH']}", "COMMANDS": str(log)}
    subprocess.run(["bash", "-euc", text], check=True, cwd=folder, env=around, capture_output=True)
    return [list(c) for c in _split(log.read_text().split("\0"))] if log.exists() else []


def _split(words: list[str]) -> Iterator[list[str]]:
    found: list[str] = []
    for word in words:
        if word == "\n":
            yield found
            found = []
        else:
            found.append(word)


def adapted(words: list[str], place: Path, free: Path) -> list[str]:
    """Return a command on the tiny model: its placeholders filled in, and what is large or far away only checked."""
    runs = (str(place / f"RUN{n}") for n in (1, 2, 3))
    filled = []
    for before, word in zip(["", *words], words, strict=False):
        if before == "--out":
            filled.append(str(free))
        elif word == "RUN":
            filled.append(next(runs))
        else:
            filled.append({"DIR": "ADAPTER", "GENERATIONS.json.gz": "generations.json.gz"}.get(word, word))
    return filled + _small(filled)


def _small(words: list[str]) -> list[str]:
    """Return what makes a run small, or only checks its settings where it needs what is not here."""
    if words[0] == "sweep":
        return [*TINY, "--seeds", "42", *QUICK]
    if words[0] != "run" or "--resume" in words:
        return ["--limit", "1", "--data", "FOLDER"] if words[0] == "eval" else []
    far = "finance" not in words or "--protocol" in words or "engine.executor=ray" in words
    if "engine.executor=ray" in words and find_spec("ray") is None:  # then the settings are refused
        words.remove("engine.executor=ray")
        words.remove("-s")
    return ["--print-config"] if far else TINY + QUICK


SHELL = [block for block in ALL if block.kind == "sh" and block.runs]


@pytest.mark.parametrize("block", SHELL, ids=[n for n, b in zip(NAMES, ALL, strict=True) if b in SHELL])
def test_the_commands_of_a_page_run(block: Block, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    found = commands(block.text, tmp_path)
    assert found
    for number, (program, *words) in enumerate(found):
        if program == "fedtune":
            words = adapted(words, place, tmp_path / f"out{number}")
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, (words, done.output[-2000:], done.exception)
        elif program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
