"""Score a generation file that somebody published, without any model. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedtune.data.files import kind_of, parse_rows, read_text_file
from fedtune.domains import TASKS
from fedtune.domains.base import SENTIMENTS, Kind
from fedtune.evaluation import again, known
from fedtune.evaluation.extract import official_answer, official_correct, strict_answer
from fedtune.evaluation.metrics import summarise
from fedtune.evaluation.programs import MOST_BYTES
from fedtune.results.schema import Score
from fedtune.types import ConfigError, CorruptFileError, Problem, nearest

ScoreMode = Literal["official", "strict"]
MOST_ROWS = 100_000  # no set has a tenth of them
SCORED = tuple(name for name, task in TASKS.items() if task.file)


# official extraction reads no letter after E
ANSWERS: dict[Kind, tuple[str, ...]] = {
    "choice": tuple("ABCDE"),
    "boolean": ("yes", "no", "maybe"),
    "sentiment": SENTIMENTS,
}


def _finance(row: Mapping[str, Any]) -> tuple[Any, Any, bool]:
    """Return (gold, output, whether the output is the model's text and not its mapped label)."""
    text = row.get("out_text", row.get("output"))
    gold = row.get("new_target", row.get("target", row.get("gold")))
    output = text if text is not None else row.get("new_out")
    if gold is None or output is None:
        raise KeyError("new_target and new_out (or target and out_text, or gold and output)")
    return gold, output, text is not None


def _choice(row: Mapping[str, Any]) -> tuple[Any, Any, bool]:
    missing = [k for k in ("gold", "output") if row.get(k) is None]
    if missing:
        raise KeyError(" and ".join(missing))
    return row["gold"], row["output"], True


def sample(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Return one published row as a per-sample row.

    Raises:
        KeyError: naming what it lacks.
        ValueError: its right answer is none of the task's, so that no output could be right.
    """
    gold, output, is_text = _finance(row) if kind == "sentiment" else _choice(row)
    if not isinstance(output, str):
        raise ValueError(f"output is {kind_of(output)}, not a text")
    if not isinstance(gold, str) or gold.lower() not in [answer.lower() for answer in ANSWERS[kind]]:
        raise ValueError(f"gold is {gold!r:.60}, not one of {', '.join(ANSWERS[kind])}")
    gold = gold.lower() if kind == "sentiment" else gold
    strict = strict_answer(output, kind) if is_text else None
    return {
        "gold": gold,
        "predicted": official_answer(output, kind),
        "correct": official_correct(output, gold, kind),
        "valid": strict is not None if is_text else None,
        "strict": strict is not None and strict.lower() == gold.lower(),
    }


def read(path: Path, kind: Kind) -> list[dict[str, Any]]:
    """Read a JSON array or JSON lines, plain or gzipped; the content decides, not the name.

    Raises:
        CorruptFileError: with the row that is wrong.
    """
    samples = []
    for number, row in enumerate(parse_rows(read_text_file(path, MOST_BYTES), str(path), MOST_ROWS), 1):
        try:
            samples.append(sample(row, kind))
        except KeyError as err:
            raise CorruptFileError(f"{path}: row {number} lacks {err.args[0]}; it has {', '.join(row)}") from err
        except ValueError as err:
            raise CorruptFileError(f"{path}: row {number}: {err}") from err
    if not samples:
        raise CorruptFileError(f"{path}: no rows")
    return samples


def _check_options(kind: Kind, mode: ScoreMode, references: Path | None) -> None:
    """Raise ConfigError for an option that would change nothing."""
    problems = []
    if kind == "program" and mode == "strict":
        problems.append(Problem("--mode strict", "has no effect: programs pass their tests or do not", "leave it out"))
    if kind != "program" and references is not None:
        what = "has no effect: only programs have tests"
        problems.append(Problem(f"--references {references}", what, "leave it out"))
    if problems:
        raise ConfigError("fedtune score", problems)


def scored(
    task: str, path: Path, mode: ScoreMode, references: Path | None = None, *, as_asked: bool = True
) -> tuple[Score, list[bool], str]:
    """Score a published generation file; programs are run again in the sandbox.

    Args:
        task: a benchmark task's name.
        path: the file.
        mode: `official` reads answers as FlowerTune does; `strict` counts clean answers only.
        references: tests of programs; by default the set's own, or those published beside them where it is not at hand.
        as_asked: whether `references` go before the set's own tests.

    Returns:
        The score, which items are right, and why it is not a score of the whole known set; empty where it is.

    Raises:
        ConfigError: unknown task, or a mode or references that its kind has no use for.
        CorruptFileError: the file cannot be read as generations.
        DataError, SandboxError: programs cannot be run.
    """
    if task not in SCORED:
        fix = nearest(task, SCORED) or f"one of {', '.join(SCORED)}"
        raise ConfigError("fedtune score", [Problem(task, "unknown task", fix)])
    known_task = TASKS[task]
    kind = known_task.kind
    _check_options(kind, mode, references)
    if kind == "program":
        asked = as_asked and references is not None
        found, rows, why = again.score_published(known_task, path, references, as_asked=asked)
        return found, [all(o["kind"] == "passed" for o in r["outcomes"]) for r in rows], why
    samples = read(path, kind)
    if mode == "strict":
        if any(s["valid"] is None for s in samples):
            raise CorruptFileError(
                f"{path}: has mapped labels, not the model's text; only --mode official can score it"
            )
        samples = [{**s, "correct": s["strict"]} for s in samples]
    placed = [{"i": i, "gold": s["gold"]} for i, s in enumerate(samples)]
    why = known.shortfall(task, "published", kind, known_task.n, placed)
    return summarise(task, mode, kind, samples), [bool(s["correct"]) for s in samples], why


def score(task: str, path: Path, mode: ScoreMode, references: Path | None = None) -> Score:
    """Return only the score of `scored`. Raises as that does."""
    return scored(task, path, mode, references)[0]
