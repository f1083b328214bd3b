"""Components by name: this package's own, and those that other installed packages offer by entry points.

A package offers a component with an entry point of its name, in the group `fedtune.methods` say. Nothing of another
package is imported before that name is asked for, or all names are listed. What cannot be used is left out of lists
with a warning; `fault` says why. A name of our own cannot be taken.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedtune.config.section import Section
from fedtune.results.manifest import source_sha256
from fedtune.results.schema import PATH_PART
from fedtune.types import last_line

T = TypeVar("T")
C = TypeVar("C")
_log = logging.getLogger("fedtune")


@dataclass(frozen=True)
class Origin:
    """Where a component comes from: the package that offers it, its version, and the hash of its source files."""

    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


Points = tuple[metadata.EntryPoint, ...]


@cache
def _offered(group: str, path: tuple[str, ...]) -> Mapping[str, Points]:
    """Return a group's entry points by name; `path` is `sys.path`, so a changed one is looked through again."""
    found: dict[str, Points] = defaultdict(tuple)
    for point in metadata.entry_points(group=group):
        found[point.name] += (point,)
    return dict(sorted(found.items()))


def _packages(points: Points) -> str:
    return " and ".join(sorted(f"{p.dist.name} {p.dist.version}" if p.dist else p.value for p in points))


def _origin(point: metadata.EntryPoint) -> Origin:
    """Return where a component that has been loaded comes from."""
    top = sys.modules[point.module.partition(".")[0]]
    # of a namespace, which many packages may share, only the module itself
    file = Path(getattr(top, "__file__", None) or sys.modules[point.module].__file__ or "")
    name, version = (point.dist.name, point.dist.version) if point.dist else (point.module, "unknown")
    return Origin(name, version, source_sha256(file.parent if file.name == "__init__.py" else file))


def subclass_of(
    base: type[C], *, texts: Sequence[str] = ("name", "title"), parameters: type = Section
) -> Callable[[str, object], type[C]]:
    """Return the check of a registry whose components are subclasses of `base`; it raises TypeError or ValueError.

    Each must have the attributes `texts`, as text; its `name` is the one that it is offered under. Its `Parameters`
    derive from `parameters`.
    """

    def check(name: str, found: object) -> type[C]:
        if not (isinstance(found, type) and issubclass(found, base)):
            raise TypeError(f"{found!r:.100} is no subclass of {base.__module__.removesuffix('.base')}.{base.__name__}")
        kind: Any = found
        if missing := [a for a in texts if not isinstance(getattr(kind, a, None), str)]:
            raise TypeError(f"{kind.__name__} has no {missing[0]}")
        if not (isinstance(kind.Parameters, type) and issubclass(kind.Parameters, parameters)):
            raise TypeError(f"{kind.__name__}.Parameters is no subclass of {parameters.__qualname__}")
        if kind.name != name:
            raise ValueError(f"{kind.__name__}.name is {kind.name!r}")
        return found

    return check


class Registry(Mapping[str, T], Generic[T]):
    """The components of one kind, such as "method", by name; iterating lists all that can be used.

    Other packages offer theirs in the group `fedtune.methods`, say. `check` takes a name and what is offered under it,
    and returns the component, or raises what is wrong with it.
    """

    def __init__(self, kind: str, own: Mapping[str, T], check: Callable[[str, object], T]) -> None:
        self.kind, self.own, self._check = kind, dict(own), check
        self._loaded: dict[Points, tuple[T, Origin] | str] = {}

    def _points(self) -> Mapping[str, Points]:
        return _offered(f"fedtune.{self.kind}s", tuple(sys.path))

    def _load(self, name: str) -> tuple[T, Origin] | str:
        """Load what another package offers under a name, once; return it, or why it cannot be used ("" for nothing)."""
        points = self._points().get(name, ())
        if points and points not in self._loaded:
            self._loaded[points] = self._first_load(name, points)
            if isinstance(fault := self._loaded[points], str):
                _log.warning("%s", fault)
        return self._loaded.get(points, "")

    def _first_load(self, name: str, points: Points) -> tuple[T, Origin] | str:
        said = f"the {self.kind} {name!r} of {_packages(points)} cannot be used"
        if name in self.own:
            return f"{said}: fedtune has one of this name"
        if len(points) > 1:
            return f"{said}: more than one package offers it; uninstall the others"
        if not re.match(PATH_PART, name):
            return f"{said}: a name has letters, digits, '.', '_' and '-', the first a small letter or a digit"
        try:
            return self._check(name, points[0].load()), _origin(points[0])
        except KeyboardInterrupt:
            raise
        except BaseException as err:  # of other people's code, which may raise anything, or end the process
            return f"{said}: {type(err).__name__}: {last_line(str(err))}"

    def fault(self, name: str) -> str:
        """Say why a component that another package offers cannot be used, or return an empty string."""
        found = self._load(name)
        return found if isinstance(found, str) else ""

    def origin(self, name: str) -> Origin | None:
        """Return where a component of another package comes from; None for one of our own, and for none at all."""
        found = "" if name in self.own else self._load(name)
        return None if isinstance(found, str) else found[1]

    def others(self) -> dict[str, T]:
        """Return the components of other packages that can be used."""
        found = {name: self._load(name) for name in self._points()}
        return {name: it[0] for name, it in found.items() if not isinstance(it, str)}

    def __getitem__(self, name: str) -> T:
        if name in self.own:
            return self.own[name]
        if isinstance(found := self._load(name), str):
            raise KeyError(name)
        return found[0]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *self.others()])

    def __len__(self) -> int:
        return len(self.own) + len(self.others())
