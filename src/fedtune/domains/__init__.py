"""The four domains and every task by name."""

from __future__ import annotations

from collections.abc import Iterable

from fedtune.config import Config
from fedtune.data import partition
from fedtune.domains.base import Domain, Item, Task, TrainingSet
from fedtune.domains.code import CODE
from fedtune.domains.finance import FINANCE
from fedtune.domains.general import GENERAL
from fedtune.domains.medical import MEDICAL
from fedtune.types import ConfigError, Problem, nearest

DOMAINS: dict[str, Domain] = {d.name: d for d in (GENERAL, FINANCE, MEDICAL, CODE)}
TASKS: dict[str, Task] = {t.name: t for d in DOMAINS.values() for t in (*d.tasks, *d.packaged_tasks)}

__all__ = ["DOMAINS", "TASKS", "Domain", "Item", "Task", "TrainingSet", "chosen_tasks", "get", "problems"]


def get(name: str) -> Domain:
    """Return a domain by name.

    Raises:
        ConfigError: with the nearest name.
    """
    if name not in DOMAINS:
        fix = nearest(name, DOMAINS) or f"one of {', '.join(DOMAINS)}"
        raise ConfigError("settings", [Problem(f'domain = "{name}"', "unknown domain", fix)])
    return DOMAINS[name]


def chosen_tasks(config: Config) -> tuple[Task, ...]:
    """Return the tasks a run is evaluated on: those named, else all of its domain for its data source."""
    domain = DOMAINS[config.domain]
    # a domain without sets of its own on the Hub or in a folder is measured on its packaged ones
    tasks = domain.packaged_tasks if config.data.source == "packaged" or not domain.tasks else domain.tasks
    return tuple(TASKS[t] for t in config.eval.tasks) or tasks


def problems(config: Config) -> Iterable[Problem]:
    """Yield what is wrong with the names of domain, tasks and partition."""
    if config.domain not in DOMAINS:
        fix = nearest(config.domain, DOMAINS) or f"one of {', '.join(DOMAINS)}"
        yield Problem(f'domain = "{config.domain}"', "unknown domain", fix)
    for name in config.eval.tasks:
        if name not in TASKS:
            yield Problem("eval.tasks", f"unknown task {name!r}", nearest(name, TASKS))
    if config.data.source == "folder" and not config.data.path:
        yield Problem("data.path", "is empty", "name the folder: --data FOLDER")
    yield from partition.problems(config.data.partition)
