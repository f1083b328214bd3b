"""Programs and their tests: assembling, running in the sandbox, pass@k. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedtune.data.files import read_text_file
from fedtune.domains.base import Task
from fedtune.domains.program_tests import WANTED, program_tests
from fedtune.evaluation import sandbox
from fedtune.evaluation.sandbox import CPP, JAVASCRIPT, PYTHON, Language, Outcome
from fedtune.io import parse_json
from fedtune.types import CorruptFileError, DataError, MissingFileError

LANGUAGES: dict[str, Language] = {"python": PYTHON, "javascript": JAVASCRIPT, "c++": CPP}
Sample = dict[str, Any]
MOST_BYTES = 64 * 1024**2  # of a published file, unzipped; the largest known one has 4 MB
GENERATIONS = (
    "wanted is a JSON array with a list for each problem, in the set's order, of whole programs (prompt and completion)"
)
REFERENCES = f"wanted is a JSON array with each problem's tests: {WANTED}"


def assemble(program: str, tests: str, language: str) -> tuple[str, str]:
    """Join a candidate and its tests.

    Returns:
        The text up to where the run's secret is printed, and the rest. The secret is printed after the last
        assertion: by the runner for Python, at the end of the file for JavaScript, and as the last statement
        of `main` (the last brace of the tests) for C++. An empty rest stands for the language's own.

    Raises:
        DataError: there are no tests.
    """
    if not tests.strip():
        raise DataError("no tests: a program that nothing is asked of has not passed")
    text = f"{program}\n{tests}"
    if language != "c++":
        return text, ""
    last = text.rfind("}")
    return text[:last], '\n    std::printf("\\n{token}");\n' + text[last:]


def truncate(text: str, stop: Sequence[str]) -> str:
    """Cut a completion before the first stop word."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else text


def pass_at(n: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n samples of which some passed (arXiv 2107.03374, eq. 1)."""
    if n - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - passed + 1, n + 1))


def run(
    programs: Sequence[str], tests: Sequence[str], language: str, on_done: Callable[[int], None] | None = None
) -> list[Outcome]:
    """Run each program with its tests in the sandbox.

    Raises:
        SandboxError: no sandbox, or the language's tool is missing.
    """
    pairs = [assemble(p, t, language) for p, t in zip(programs, tests, strict=True)]
    return list(sandbox.execute_all(pairs, LANGUAGES[language], on_done))


def run_each(programs: Sequence[Sequence[str]], tests: Sequence[str], language: str) -> list[Sample]:
    """Run each problem's programs with its tests; return a row with its outcomes for each. Raises as `run`."""
    repeated = [text for text, own in zip(tests, programs, strict=True) for _ in own]
    outcomes = iter(run([program for own in programs for program in own], repeated, language))
    return [{"outcomes": [_as_logged(next(outcomes)) for _ in own]} for own in programs]


def _as_logged(outcome: Outcome) -> Sample:
    return {"kind": outcome.kind, "compiled": outcome.compiled, "detail": outcome.detail}


def _read(path: Path, wanted: str) -> list[Any]:
    try:
        document = parse_json(read_text_file(path, MOST_BYTES), str(path))
    except MissingFileError:
        raise
    except CorruptFileError as err:
        raise CorruptFileError(f"{err}; {wanted}") from err
    if not isinstance(document, list) or not document:
        raise CorruptFileError(f"{path}: is not a JSON array of problems; {wanted}")
    return document


def read_published(path: Path) -> list[list[str]]:
    """Read a published generations file: for each problem a list of programs. Raises CorruptFileError."""
    found = _read(path, GENERATIONS)
    for number, samples in enumerate(found):
        if not isinstance(samples, list) or not samples or not all(isinstance(s, str) for s in samples):
            raise CorruptFileError(f"{path}: problem {number} is not a list of programs; {GENERATIONS}")
    return [list(samples) for samples in found]


def published_tests(task: Task, path: Path, references: Path | None, count: int) -> list[str]:
    """Return the tests that somebody published for their programs, one text for each problem (see `program_tests`).

    Args:
        references: the tests' file; the one published beside the generations by default.
        count: how many problems the generations have.

    Raises:
        DataError: no such file. CorruptFileError: it does not fit.
    """
    guess = path.with_name(path.name.replace("generations", "references"))
    found = references or (guess if guess != path and guess.exists() else None)
    if found is None:
        raise DataError(f"{path}: no references file beside it; name the tests with --references FILE")
    entries = _read(found, REFERENCES)
    if count != len(entries):
        raise CorruptFileError(f"{path} has {count} problems, {found} has {len(entries)}")
    tests = []
    for number, entry in enumerate(entries):
        try:
            tests.append(program_tests(entry, task.language))
        except ValueError as err:
            raise CorruptFileError(f"{found}: problem {number}: {err}") from err
    return tests
