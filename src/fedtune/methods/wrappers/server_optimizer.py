"""Server optimisers: the round's mean change is a gradient to an optimiser on the server (arXiv 2003.00295).

Two conventions go by name. `openfedllm` (arXiv 2402.06954): FedAvgM is a moving average, second moments start at
tau^2, nothing is bias-corrected. `flower`: what Flower 1.4x computes - FedAvgM is PyTorch's momentum, second moments
start at 0, FedAdam's step is bias-corrected with the exponent round + 1.

The optimiser acts on the factors' own coordinates, so with a method that trains both factors its result depends on
how clients split their products (gauge).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedtune.lora.state import to_tensors, with_tensors
from fedtune.methods.base import Method
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState
from fedtune.methods.wrappers.base import Having, Idle, Wrapper
from fedtune.types import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config
    from fedtune.config.schema import ServerSettings

Numbers = Mapping[str, float]
DEFAULTS: dict[tuple[str, str], Numbers] = {
    ("openfedllm", "fedavgm"): {"learning_rate": 1.0, "beta1": 0.9, "beta2": 0.0, "tau": 0.0},
    ("openfedllm", "fedadagrad"): {"learning_rate": 1e-3, "beta1": 0.0, "beta2": 0.0, "tau": 1e-3},
    ("openfedllm", "fedyogi"): {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    ("openfedllm", "fedadam"): {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    ("flower", "fedavgm"): {"learning_rate": 1.0, "beta1": 0.9, "beta2": 0.0, "tau": 0.0},
    ("flower", "fedadagrad"): {"learning_rate": 1e-1, "beta1": 0.0, "beta2": 0.0, "tau": 1e-3},
    ("flower", "fedyogi"): {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    ("flower", "fedadam"): {"learning_rate": 1e-1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
}
UNUSED = {"fedavgm": ("beta2", "tau"), "fedadagrad": ("beta2",)}


@dataclass(frozen=True)
class _Rule:
    """One tensor's step.

    Attributes:
        numbers: learning rate, betas, tau.
        flower: the convention.
        first: whether there was no step before.
        round: the round's number, from 1.
    """

    numbers: Numbers
    flower: bool
    first: bool
    round: int

    def momentum(self, change: Tensor, m: Tensor) -> Tensor:
        """Return the first moment; OpenFedLLM's starts with the first change itself."""
        beta = self.numbers["beta1"]
        if self.first and not self.flower:
            return change
        return beta * m + (1 - beta) * change

    def fedavgm(self, change: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.numbers["beta1"] * m + change if self.flower else self.momentum(change, m)
        return self.numbers["learning_rate"] * m, m, v

    def _adaptive(self, m: Tensor, v: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        return rate * m / (v.sqrt() + self.numbers["tau"]), m, v

    def fedadagrad(self, change: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._adaptive(self.momentum(change, m), v + change.square(), self.numbers["learning_rate"])

    def fedyogi(self, change: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        square = change.square()
        v = v - (1 - self.numbers["beta2"]) * square * (v - square).sign()
        return self._adaptive(self.momentum(change, m), v, self.numbers["learning_rate"])

    def fedadam(self, change: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        beta1, beta2, rate = (self.numbers[k] for k in ("beta1", "beta2", "learning_rate"))
        if self.flower:
            rate *= (1 - beta2 ** (self.round + 1)) ** 0.5 / (1 - beta1 ** (self.round + 1))
        v = beta2 * v + (1 - beta2) * change.square()
        return self._adaptive(self.momentum(change, m), v, rate)


def numbers(settings: ServerSettings) -> Numbers:
    """Return an optimiser's numbers: the convention's, and what was set by hand."""
    known = DEFAULTS[settings.convention, settings.optimizer]
    own = {key: getattr(settings, key) for key in known}
    return {key: known[key] if own[key] == "default" else float(own[key]) for key in known}


def step(
    settings: ServerSettings,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    memory: Mapping[str, Tensor],
    round_: int,
    trained: Callable[[str], bool],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors after a server step, and the optimiser's memory.

    Args:
        settings: which optimiser, convention, and numbers.
        old: the global tensors before the round.
        new: what the method made of the clients' updates; new - old is the change.
        memory: from the last step, by name; empty at first.
        round_: the round's number.
        trained: tells by name what was trained; momentum must not move what is frozen this round.
    """
    known = numbers(settings)
    start = 0.0 if settings.convention == "flower" else known["tau"] ** 2
    after, kept = {}, dict(memory)
    for name, was in old.items():
        if not trained(name):
            after[name] = new[name]
            continue
        m = memory.get(f"m/{name}", was.new_zeros(was.shape))
        v = memory.get(f"v/{name}", was.new_full(was.shape, start))
        rule = _Rule(known, settings.convention == "flower", f"m/{name}" not in memory, round_)
        update: Callable[..., tuple[Tensor, Tensor, Tensor]] = getattr(rule, settings.optimizer)
        change, kept[f"m/{name}"], kept[f"v/{name}"] = update(new[name] - was, m, v)
        after[name] = was + change
    return after, kept


class ServerOptimizer(Wrapper):
    """Takes the change that a method made as a gradient."""

    name = "server"

    @classmethod
    def asked(cls, config: Config, kind: type[Method]) -> bool:
        """With `server.optimizer`."""
        return config.server.optimizer != "none"

    @classmethod
    def problems(cls, config: Config, kind: type[Method], having: Having) -> Iterable[Problem]:
        """Refuse methods whose tensors mean something else each round."""
        if not kind.steady:
            fix = f"these keep them: {having(lambda m: m.steady)}"
            yield Problem("server.optimizer", f"{kind.name}'s factors change coordinates", fix)

    @classmethod
    def idle(cls, config: Config, kind: type[Method]) -> Idle:
        """Name the numbers that the chosen optimiser does not use."""
        chosen = config.server.optimizer
        unused = UNUSED.get(chosen, ())
        if chosen == "none":
            unused = tuple(name for name in type(config.server).model_fields if name != "optimizer")
        return [(f"server.{name}", f'server.optimizer = "{chosen}" does not use it') for name in unused]

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Step from the adapter before the round towards what the method made of it."""
        after = self.inner.server_step(updates, state, context)
        stepped, memory = step(
            self.config.server,
            to_tensors(state.adapter),
            to_tensors(after.adapter),
            state.memory.get(self.name, {}),
            context.round,
            lambda name: self.method.trainable(context.round, name),
        )
        return replace(after, adapter=with_tensors(after.adapter, stepped), memory={**after.memory, self.name: memory})
