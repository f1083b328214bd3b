"""The four domains and every task by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedtune.config import Config
from fedtune.data import hub, partition
from fedtune.data.hub import HubSet
from fedtune.domains.base import Domain, Item, Task, TrainingSet
from fedtune.domains.code import CODE
from fedtune.domains.finance import FINANCE
from fedtune.domains.general import GENERAL
from fedtune.domains.medical import MEDICAL
from fedtune.types import ConfigError, Problem, nearest

DOMAINS: dict[str, Domain] = {d.name: d for d in (GENERAL, FINANCE, MEDICAL, CODE)}
TASKS: dict[str, Task] = {t.name: t for d in DOMAINS.values() for t in (*d.tasks, *d.packaged_tasks)}

__all__ = [
    "DOMAINS",
    "TASKS",
    "Domain",
    "Item",
    "Task",
    "TrainingSet",
    "chosen_tasks",
    "get",
    "problems",
    "training_set",
    "unranked_reasons",
]


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


def training_set(config: Config) -> HubSet | None:
    """Return the training set on the Hub that a run reads, at the revision it asks for; None where it reads another."""
    known = DOMAINS[config.domain].training.hub
    if config.data.source != "hub" or known is None:
        return None
    return replace(known, revision=config.data.revision or known.revision)


def unranked_reasons(config: Config) -> tuple[str, ...]:
    """Say why the training data alone keep a run from being ranked: rows that may change under their name."""
    if config.data.source == "folder":
        return ("the training data are a local folder; only their hash is known",)
    found = training_set(config)
    if found is None or hub.is_commit(found.revision):
        return ()
    if found.revision:
        return (f"data.revision {found.revision!r} is not a commit (40 digits), so it may move",)
    return (f"the training set {found.id} has no pinned revision; set data.revision to a commit",)


def problems(config: Config) -> Iterable[Problem]:
    """Yield what is wrong with the names of domain, tasks and partition."""
    if config.domain not in DOMAINS:
        fix = nearest(config.domain, DOMAINS) or f"one of {', '.join(DOMAINS)}"
        yield Problem(f'domain = "{config.domain}"', "unknown domain", fix)
    for name in config.eval.tasks:
        if name not in TASKS:
            yield Problem("eval.tasks", f"unknown task {name!r}", nearest(name, TASKS))
    if config.data.revision and config.data.source != "hub":
        yield Problem("data.revision", f'has no effect with data.source = "{config.data.source}"', "leave it out")
    yield from partition.problems(config.data.partition)
