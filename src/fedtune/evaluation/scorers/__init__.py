"""The kinds of tasks: each has scorers by the words of `eval.modes`. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from fedtune.config.schema import EvalSettings, Mode
from fedtune.domains.base import Task
from fedtune.evaluation.scorers.base import Metric, Scorer, Solver
from fedtune.evaluation.scorers.choice import BOOLEAN, CHOICE
from fedtune.evaluation.scorers.program import PROGRAM
from fedtune.evaluation.scorers.sentiment import SENTIMENT
from fedtune.evaluation.scorers.solution import SOLUTION
from fedtune.registry import Registry
from fedtune.types import ConfigError, Problem, nearest

Scorers = Mapping[str, Scorer]


def _checked(name: str, found: object) -> Scorers:
    """Return the scorers of a kind that another package offers. Raises TypeError or ValueError: they are none."""
    if not isinstance(found, Mapping) or not found or not all(isinstance(one, Scorer) for one in found.values()):
        raise TypeError(f"{found!r:.100} is no mapping of scorers")
    if unknown := [word for word in found if word not in get_args(Mode)]:
        raise ValueError(f"{unknown[0]!r} is no word of eval.modes")
    return found


_OWN: dict[str, Scorers] = {
    "choice": CHOICE,
    "boolean": BOOLEAN,
    "sentiment": SENTIMENT,
    "solution": SOLUTION,
    "program": PROGRAM,
}
KINDS = Registry("kind", _OWN, _checked)

__all__ = ["KINDS", "Metric", "Scorer", "Solver", "find", "metric", "of", "one_of", "planned", "published"]


def of(task: Task) -> Scorers:
    """Return a task's scorers by the words of `eval.modes`.

    Raises:
        ConfigError: its kind has none, with the nearest one.
    """
    found = KINDS.get(task.kind)
    if found is None:
        fix = KINDS.fault(task.kind) or nearest(task.kind, KINDS) or f"one of {', '.join(KINDS)}"
        raise ConfigError(f"task {task.name}", [Problem(f"kind = {task.kind!r}", "has no scorers", fix)])
    return found


def planned(task: Task, settings: EvalSettings) -> Iterator[Scorer]:
    """Yield what scores a task under some settings, in their order; not every kind has every mode."""
    scorers = of(task)
    yield from (scorers[mode] for mode in settings.modes if mode in scorers)


def find(task: Task, mode: str) -> Scorer | None:
    """Return what scores a task in a mode as results name it; None where its kind has none such."""
    return next((scorer for scorer in of(task).values() if scorer.mode == mode), None)


def one_of(task: Task) -> Scorer:
    """Return a scorer of a task, for what all of its scorers agree on: `key` and `not_run_again`."""
    return next(iter(of(task).values()))


def published(task: Task) -> Scorer | None:
    """Return what scores files of answers that somebody published; None where nobody does."""
    return next((scorer for scorer in of(task).values() if scorer.readings), None)


def metric(name: str) -> Metric:
    """Return a score's metric by the name it has in files; one that is not known here is shown as a share."""
    known = {scorer.metric.name: scorer.metric for kind in KINDS.own.values() for scorer in kind.values()}
    if name not in known:
        known |= {scorer.metric.name: scorer.metric for kind in KINDS.others().values() for scorer in kind.values()}
    return known.get(name, Metric(name))
