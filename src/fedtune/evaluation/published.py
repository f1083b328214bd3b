"""Score a generation file that somebody published, without any model. No torch."""

from __future__ import annotations

from pathlib import Path

from fedtune.domains import TASKS
from fedtune.evaluation import scorers
from fedtune.evaluation.scorers import Scorer
from fedtune.results.schema import Score
from fedtune.types import ConfigError, Problem, nearest


def scorer_of(task: str) -> Scorer:
    """Return what scores published files of a benchmark task. Raises ConfigError where there is no such task."""
    able = {name: found for name, own in TASKS.own.items() if own.file and (found := scorers.published(own))}
    if task not in able:
        fix = nearest(task, able) or f"one of {', '.join(able)}"
        raise ConfigError("fedtune score", [Problem(task, "unknown task", fix)])
    return able[task]


def scored(
    task: str, path: Path, reading: str = "official", references: Path | None = None, *, as_asked: bool = True
) -> tuple[Score, list[bool], str]:
    """Score a published generation file; programs are run again in the sandbox.

    Args:
        reading: `official` reads answers as FlowerTune does; `strict` counts clean answers only.
        references: tests of programs; by default the set's own, or those published beside them where it is not at hand.
        as_asked: whether `references` go before the set's own tests.

    Returns:
        The score, which items are right, and why it is not a score of the whole known set; empty where it is.

    Raises:
        ConfigError: unknown task, or a reading or references that its kind has no use for.
        CorruptFileError: the file cannot be read as generations.
        DataError, SandboxError: programs cannot be run.
    """
    scorer = scorer_of(task)
    problems = []
    if reading not in scorer.readings:
        fix = nearest(reading, scorer.readings) or "leave it out"
        problems.append(Problem(f"--mode {reading}", f"{task} is scored as {' or '.join(scorer.readings)}", fix))
    if references is not None and not scorer.needs_tests:
        what = "has no effect: only programs have tests"
        problems.append(Problem(f"--references {references}", what, "leave it out"))
    if problems:
        raise ConfigError("fedtune score", problems)
    samples, why = scorer.published(TASKS[task], path, reading, references, as_asked=as_asked)
    score = scorer.summarise(task, samples).model_copy(update={"mode": reading})
    return score, [bool(s["correct"]) for s in samples], why
