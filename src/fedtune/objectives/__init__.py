"""Objectives, that is what training minimises, by name: ours, and those of other packages. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedtune.config import Config
from fedtune.config.section import own_problems
from fedtune.objectives.base import Example, Objective, by_text
from fedtune.objectives.cross_entropy import CrossEntropy
from fedtune.registry import Registry, subclass_of
from fedtune.types import Problem, nearest

OBJECTIVES = Registry[type[Objective[Any]]]("objective", {CrossEntropy.name: CrossEntropy}, subclass_of(Objective))

__all__ = ["OBJECTIVES", "CrossEntropy", "Example", "Objective", "build", "by_text", "problems"]


def problems(config: Config) -> Iterable[Problem]:
    """Yield what is wrong with the objective, its settings, and what it is combined with."""
    name = config.objective.name
    if name not in OBJECTIVES:
        fix = OBJECTIVES.fault(name) or nearest(name, OBJECTIVES) or "list them: fedtune ls objectives"
        yield Problem(f'objective.name = "{name}"', "unknown objective", fix)
        return
    chosen = OBJECTIVES[name]
    yield from own_problems("objective", name, chosen.Parameters, config.objective.parameters)
    if chosen.texts > 1 and config.attack.kind == "label-flip":
        where = 'attack.kind = "label-flip"'
        yield Problem(where, f"exchanges the only answer to a question, and {name} trains on {chosen.texts}")
    yield from chosen.problems(config)


def kind(config: Config) -> type[Objective[Any]]:
    """Return the objective that a run names, without its settings."""
    return OBJECTIVES[config.objective.name]


def build(config: Config) -> Objective[Any]:
    """Return the objective of a run. The settings have passed `problems`."""
    chosen = kind(config)
    return chosen(chosen.Parameters.model_validate(config.objective.parameters))
