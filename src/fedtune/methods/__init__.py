"""The methods by name: ours, a file and a line here each, and those of other packages. No torch here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from fedtune import spaces
from fedtune.config import Config
from fedtune.config.section import own_problems
from fedtune.methods import wrappers
from fedtune.methods.algorithm import Algorithm
from fedtune.methods.base import ANY, Method
from fedtune.methods.effects import without_effect
from fedtune.methods.fed_sb import FedSB
from fedtune.methods.fedalt import FedALT
from fedtune.methods.fedask import FedASK
from fedtune.methods.feddpa import FedDPA
from fedtune.methods.fedex_lora import FedExLoRA
from fedtune.methods.fedilora import FediLoRA
from fedtune.methods.fedit import FedIT
from fedtune.methods.fedkseed import FedKSeed
from fedtune.methods.fedmomentum import FedMomentum
from fedtune.methods.fedrot_lora import FedRotLoRA
from fedtune.methods.fedsa_lora import FedSALoRA
from fedtune.methods.fedsvd import FedSVD
from fedtune.methods.ffa_lora import FFALoRA
from fedtune.methods.flexlora import FlexLoRA
from fedtune.methods.flora import FLoRA
from fedtune.methods.florist import FLoRIST
from fedtune.methods.hetlora import HetLoRA
from fedtune.methods.hlora import HLoRA
from fedtune.methods.lora_a2 import LoRAA2
from fedtune.methods.lora_fair import LoRAFAIR
from fedtune.methods.rac_lora import RACLoRA
from fedtune.methods.rbla import RBLA
from fedtune.methods.rolora import RoLoRA
from fedtune.methods.state import ClientUpdate, RoundContext, RunContext, ServerState, Upload
from fedtune.methods.wrappers.rules import RULES
from fedtune.registry import Registry, subclass_of
from fedtune.types import Problem, derive_seed, nearest

_ALL: tuple[type[Method], ...] = (
    FedIT,
    FFALoRA,
    FedSALoRA,
    RoLoRA,
    FLoRA,
    FedExLoRA,
    FlexLoRA,
    HLoRA,
    FLoRIST,
    FedMomentum,
    RBLA,
    FediLoRA,
    HetLoRA,
    LoRAFAIR,
    FedSVD,
    FedSB,
    FedRotLoRA,
    FedASK,
    RACLoRA,
    LoRAA2,
    FedALT,
    FedDPA,
    FedKSeed,
)


METHODS = Registry[type[Method]](
    "method",
    {m.name: m for m in _ALL},
    subclass_of(Method, texts=("name", "title", "paper"), parameters=Method.Parameters),
)
AROUND = {
    "fedprox": "drift.proximal_mu=0.01",
    "scaffold": "drift.scaffold=true with train.optimizer=sgd",
    "fedavg": "server.optimizer=none (the default)",
    **{name: f"server.optimizer={name}" for name in ("fedavgm", "fedadagrad", "fedyogi", "fedadam")},
    **{name: f"robust.rule={name}" for name in RULES},
}

__all__ = [
    "METHODS",
    "Algorithm",
    "ClientUpdate",
    "Method",
    "RoundContext",
    "RunContext",
    "ServerState",
    "Upload",
    "build",
    "create",
    "problems",
]


def _names(having: Callable[[type[Method]], object]) -> str:
    return ", ".join(m for m in METHODS if having(METHODS[m]))


def unknown(name: str) -> str:
    """Say what a name that is no method may have meant."""
    if fault := METHODS.fault(name):
        return fault
    if name in AROUND:
        return f"it goes around a method: --set {AROUND[name]}"
    return nearest(name, [*METHODS, *AROUND]) or "list them: fedtune ls methods"


def problems(config: Config) -> Iterable[Problem]:
    """Yield what is wrong with the method and what is around it; a setting without effect is refused."""
    yield from invalid(config)
    if config.method.name in METHODS and config.peft.kind in spaces.SPACES:
        yield from without_effect(config, METHODS[config.method.name])


def invalid(config: Config) -> Iterable[Problem]:
    """Yield what is wrong with the method and what is around it, whatever today's defaults are."""
    name = config.method.name
    if name not in METHODS:
        yield Problem(f'method.name = "{name}"', "unknown method", unknown(name))
        return
    if config.peft.kind in spaces.SPACES:
        yield from _combination(config, METHODS[name])
    yield from _own_settings(config, METHODS[name])


def _own_settings(config: Config, kind: type[Method]) -> Iterable[Problem]:
    given = config.method.parameters
    wrong = list(own_problems("method", kind.name, kind.Parameters, given))
    yield from wrong
    if not wrong and (reason := kind.Parameters.model_validate(given).inert()):
        yield Problem(f"method ({kind.name})", f"has no effect: {reason}")


def not_defined(kind: type[Method], space: str, where: str) -> Iterable[Problem]:
    """Yield that a method is not defined in a space, with those that are."""
    if not kind.spaces & {space, *ANY}:
        able = _names(lambda m: m.spaces & {space, *ANY})
        yield Problem(where, f'{kind.name} is not defined with peft.kind = "{space}"', f"these are: {able}")


def _combination(config: Config, kind: type[Method]) -> Iterable[Problem]:
    """Yield what a method does not go together with."""
    name = kind.name
    yield from not_defined(kind, config.peft.kind, f'method.name = "{name}"')
    if config.lora.ranks and not kind.mixed_ranks:
        yield Problem(
            "lora.ranks", f"{name} needs one rank for all clients", f"mixed ranks: {_names(lambda m: m.mixed_ranks)}"
        )
    if isinstance(config.lora.ranks, tuple) and config.lora.ranks:
        have, need = len(config.lora.ranks), config.federation.clients
        if have != need:
            yield Problem("lora.ranks", f"has {have} ranks for {need} clients", "or shares: {4 = 0.5, 16 = 0.5}")
    # where a method takes them as budgets, they are another thing than ranks
    ranks = kind(kind.Parameters.model_construct(), RunContext(ranks=client_ranks(config))).run.ranks
    if set(ranks.values()) == {config.lora.r}:
        yield Problem("lora.ranks", f"has no effect: every client has r = {config.lora.r} without it", "leave it out")
    yield from wrappers.problems(config)
    for taken in (name for name in config.wrappers if name in METHODS):
        yield Problem(f"wrappers.{taken}", "has the name of a method, and the tensors of both would be mixed up")
    for wrapper in wrappers.asked(config, kind):
        yield from wrapper.problems(config, kind, _names)


def client_ranks(config: Config) -> dict[int, int]:
    """Return each client's rank, where they differ: as listed, or drawn by shares (largest remainder, seeded)."""
    ranks, clients = config.lora.ranks, config.federation.clients
    if not isinstance(ranks, dict):
        return dict(enumerate(ranks))
    exact = {rank: share * clients for rank, share in ranks.items()}
    counts = {rank: int(value) for rank, value in exact.items()}
    order = sorted(exact, key=lambda r: (counts[r] - exact[r], r))
    for rank in order[: clients - sum(counts.values())]:
        counts[rank] += 1
    dealt = [rank for rank in sorted(counts) for _ in range(counts[rank])]
    random.Random(derive_seed(config.seed, "ranks")).shuffle(dealt)
    return dict(enumerate(dealt))


def build(config: Config) -> Method:
    """Return the method a run asks for. The settings have passed `problems`."""
    kind = METHODS[config.method.name]
    ranks = client_ranks(config) if config.arm != "centralised" else {}
    run = RunContext(config.seed, ranks, config.lora.r, config.federation.cohort_size)
    return kind(kind.Parameters.model_validate(config.method.parameters), run)


def create(config: Config) -> Algorithm:
    """Return the method a run asks for, with everything the settings put around it."""
    return Algorithm(build(config), config)
