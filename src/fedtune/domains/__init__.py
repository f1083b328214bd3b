"""The domains and every task by name: our own, and those of other packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from fedtune.config import Config
from fedtune.data import hub, partition
from fedtune.data.hub import HubSet
from fedtune.domains.base import Domain, Item, Task, TrainingSet
from fedtune.domains.code import CODE
from fedtune.domains.finance import FINANCE
from fedtune.domains.general import GENERAL
from fedtune.domains.medical import MEDICAL
from fedtune.registry import Origin, Registry
from fedtune.types import Problem, nearest


def _of(domains: Iterable[Domain]) -> dict[str, Task]:
    """Return the tasks of domains by name; of two with one name the first."""
    return {t.name: t for d in reversed(list(domains)) for t in reversed((*d.tasks, *d.packaged_tasks))}


def _checked(name: str, found: object) -> Domain:
    """Return a domain that another package offers. Raises TypeError or ValueError: it is none, or has a name twice."""
    if not isinstance(found, Domain):
        raise TypeError(f"{found!r:.100} is no fedtune.domains.Domain")
    if found.name != name:
        raise ValueError(f"its name is {found.name!r}")
    if taken := [t.name for t in _of([found]).values() if TASKS.own.get(t.name, t) is not t]:
        raise ValueError(f"fedtune has a task {taken[0]!r} already")
    return found


class Tasks(Mapping[str, Task]):
    """The tasks of all domains by name; those of other packages are looked for where a name is none of our own."""

    def __init__(self, domains: Registry[Domain]) -> None:
        self.own, self._domains = _of(domains.own.values()), domains

    def _all(self) -> dict[str, Task]:
        return {**self.own, **_of(self._domains.others().values()), **self.own}

    def origin(self, name: str) -> Origin | None:
        """Return where a task of another package comes from; None for one of our own, and for none at all."""
        domains = () if name in self.own else self._domains.others().values()
        return next((self._domains.origin(d.name) for d in domains if name in _of([d])), None)

    def __getitem__(self, name: str) -> Task:
        return self.own[name] if name in self.own else self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


DOMAINS = Registry("domain", {d.name: d for d in (GENERAL, FINANCE, MEDICAL, CODE)}, _checked)
TASKS = Tasks(DOMAINS)

# what other packages make domains of
__all__ = ["DOMAINS", "TASKS", "Domain", "Item", "Task", "TrainingSet"]


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
        name = config.domain
        fix = DOMAINS.fault(name) or nearest(name, DOMAINS) or f"one of {', '.join(DOMAINS)}"
        yield Problem(f'domain = "{name}"', "unknown domain", fix)
    for name in config.eval.tasks:
        if name not in TASKS:
            yield Problem("eval.tasks", f"unknown task {name!r}", nearest(name, TASKS))
    if config.data.revision and config.data.source != "hub":
        yield Problem("data.revision", f'has no effect with data.source = "{config.data.source}"', "leave it out")
    yield from partition.problems(config.data.partition)
