"""What goes around a method, by explicit list, from the outside in. No torch here.

On the client each changes what the ones inside it ask for and send; on the server what they get and what they return.
"""

from __future__ import annotations

from functools import reduce

from fedtune.config import Config
from fedtune.methods.base import Method
from fedtune.methods.wrappers.attack import Attackers
from fedtune.methods.wrappers.base import Innermost, RoundContext, Wrapper
from fedtune.methods.wrappers.dora import DoRA
from fedtune.methods.wrappers.fedprox import FedProx
from fedtune.methods.wrappers.robust import Robust
from fedtune.methods.wrappers.scaffold import Scaffold
from fedtune.methods.wrappers.server_optimizer import ServerOptimizer

WRAPPERS: tuple[type[Wrapper], ...] = (Attackers, Scaffold, Robust, DoRA, ServerOptimizer, FedProx)

__all__ = ["WRAPPERS", "Innermost", "RoundContext", "Wrapper", "asked", "wrapped"]


def asked(config: Config, kind: type[Method]) -> tuple[type[Wrapper], ...]:
    """Return the wrappers that a run's settings ask for, from the outside in."""
    return tuple(wrapper for wrapper in WRAPPERS if wrapper.asked(config, kind))


def wrapped(method: Method, config: Config) -> Innermost:
    """Return a method inside the wrappers that a run's settings ask for."""
    own = Innermost(method, config)
    return reduce(lambda inner, wrapper: wrapper(inner), reversed(asked(config, type(method))), own)
