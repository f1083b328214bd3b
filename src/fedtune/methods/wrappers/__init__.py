"""What goes around a method: ours, by explicit list, and those of other packages, from the outside in. No torch here.

On the client each changes what the ones inside it ask for and send; on the server what they get and what they return.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import cast

from fedtune.config import Config
from fedtune.config.section import own_problems
from fedtune.methods.base import Method
from fedtune.methods.wrappers.attack import Attackers
from fedtune.methods.wrappers.base import Wrapper
from fedtune.methods.wrappers.dora import DoRA
from fedtune.methods.wrappers.fedprox import FedProx
from fedtune.methods.wrappers.robust import Robust
from fedtune.methods.wrappers.scaffold import Scaffold
from fedtune.methods.wrappers.server_optimizer import ServerOptimizer
from fedtune.registry import Registry, subclass_of
from fedtune.types import Problem, nearest

_OWN: tuple[type[Wrapper], ...] = (Attackers, Scaffold, Robust, DoRA, ServerOptimizer, FedProx)

__all__ = ["WRAPPERS", "Wrapper", "asked", "problems", "wrapped"]


WRAPPERS = Registry[type[Wrapper]]("wrapper", {w.name: w for w in _OWN}, subclass_of(Wrapper, texts=("name",)))


def problems(config: Config) -> Iterable[Problem]:
    """Yield what is wrong with the wrappers that settings name, and with the settings of each."""
    for name, given in config.wrappers.items():
        if name in WRAPPERS.own:
            yield Problem(f"wrappers.{name}", "is no wrapper of another package; ours have sections of their own")
        elif name not in WRAPPERS:
            fix = WRAPPERS.fault(name) or nearest(name, WRAPPERS) or "list them: fedtune ls wrappers"
            yield Problem(f"wrappers.{name}", "unknown wrapper", fix)
        else:
            yield from own_problems(f"wrappers.{name}", name, WRAPPERS[name].Parameters, given)


def named(config: Config) -> list[type[Wrapper]]:
    """Return the wrappers of other packages that settings name."""
    return [WRAPPERS[name] for name in sorted(config.wrappers) if name in WRAPPERS]


def asked(config: Config, kind: type[Method]) -> tuple[type[Wrapper], ...]:
    """Return the wrappers that a run's settings ask for, from the outside in.

    Those of other packages, by name, stand inside the attackers and around all others of ours.
    """
    first, *rest = _OWN
    return tuple(wrapper for wrapper in (first, *named(config), *rest) if wrapper.asked(config, kind))


def wrapped(method: Method, config: Config) -> Method | Wrapper:
    """Return a method inside the wrappers that a run's settings ask for."""
    around = reversed(asked(config, type(method)))
    return reduce(lambda inner, wrapper: wrapper(inner, config), around, cast("Method | Wrapper", method))
