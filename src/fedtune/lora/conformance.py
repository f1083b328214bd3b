"""Which identities an aggregation of LoRA adapters keeps: checks that anybody can run on their own code.

The function under test takes a list of PEFT states (name -> tensor, as in `adapter_model.safetensors`) and a list of
weights, and returns one state. Every state has alpha = rank, so that a state's delta is B A; the states are random,
float64, and not square. A result of another rank than the clients' is fine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedtune.lora import product
from fedtune.lora.state import AdapterState, LoraModule, from_tensors, to_tensors

State = dict[str, Tensor]
Aggregation = Callable[[list[State], list[float]], Mapping[str, Tensor]]

OUT, IN, RANK = 11, 7, 3
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Finding:
    """One identity.

    Attributes:
        name: what should hold.
        holds: whether it does; None where it could not be tried.
        error: relative distance from what it should be.
        whose: which aggregations should keep it.
        raised: the error that came instead of a result.
    """

    name: str
    holds: bool | None
    error: float | None
    whose: str
    raised: str = ""

    @property
    def damning(self) -> bool:
        """Whether an aggregation is wrong that does not keep it."""
        return not self.holds and self.whose.startswith("any")


def random_adapter(seed: int, rank: int = RANK, dtype: torch.dtype = torch.float64) -> AdapterState:
    """Return an adapter of two layers with delta B A."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    names = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    return {name: LoraModule(draw(rank, IN), draw(OUT, rank), float(rank)) for name in names}


def _deltas(adapter: AdapterState) -> dict[str, Tensor]:
    return {path: (m.b.double() @ m.a.double()) for path, m in adapter.items()}


def _result(function: Aggregation, adapters: Sequence[AdapterState], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the dense deltas of what the function makes of copies of the adapters."""
    states = [{n: t.clone() for n, t in to_tensors(a).items()} for a in adapters]
    return _deltas(from_tensors(dict(function(states, list(weights))), 1.0))


def _distance(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    gap = sum(float((got[p] - want[p]).square().sum()) for p in want)
    return float((gap / sum(float(t.square().sum()) for t in want.values())) ** 0.5)


def _mean(adapters: Sequence[AdapterState], weights: Sequence[float]) -> dict[str, Tensor]:
    shares = [w / sum(weights) for w in weights]
    deltas = [_deltas(a) for a in adapters]
    return {p: torch.stack([w * d[p] for w, d in zip(shares, deltas, strict=True)]).sum(0) for p in deltas[0]}


ONE, TWO, THREE = ALL = [random_adapter(seed) for seed in (1, 2, 3)]
WEIGHTS = [1.0, 2.0, 5.0]
COMMON_A = "exact where A is common"
MIXED = "exact with mixed ranks"
# of a method that is meant to stay near where it started, these do not hold
FIXED_POINTS = ("one client is its own model", "identical clients are a fixed point")
# adapters with their weights, as the function is given them
Given = tuple[Sequence[AdapterState], Sequence[float]]


def _identities() -> Iterator[tuple[str, Given, Given | dict[str, Tensor], str, float]]:
    """Yield each identity: name, what is given, what comes of it (or what else gives the same), whose, tolerance."""
    any_, weighted, given = "any aggregation", "any weighted aggregation", (ALL, WEIGHTS)
    yield FIXED_POINTS[0], ([ONE], [7.0]), _deltas(ONE), any_, TOLERANCE
    yield FIXED_POINTS[1], ([ONE, ONE, ONE], WEIGHTS), _deltas(ONE), any_, TOLERANCE
    yield "the order of clients does not matter", ([THREE, ONE, TWO], [5.0, 1.0, 2.0]), given, any_, TOLERANCE
    yield "only the ratio of weights counts", (ALL, [10.0, 20.0, 50.0]), given, weighted, TOLERANCE
    doubled = ([ONE, TWO, TWO], [1.0, 1.0, 1.0])
    yield "a doubled client is a doubled weight", doubled, ([ONE, TWO], [1.0, 2.0]), weighted, TOLERANCE
    yield "the same call gives the same result", given, given, any_, 0.0
    shared = [{p: replace(m, a=ONE[p].a) for p, m in a.items()} for a in ALL]
    who = "any; methods with a frozen factor rest on it"
    yield COMMON_A, (shared, WEIGHTS), _mean(shared, WEIGHTS), who, TOLERANCE
    turn = torch.tensor([[2.0, 1.0, 0.0], [0.5, -3.0, 1.0], [0.0, 1.0, 0.25]], dtype=torch.float64)
    moved = {p: product.regauge(m, turn) for p, m in ONE.items()}
    who = "methods in product space; not FedIT"
    yield "a client's change of gauge changes nothing", ([moved, TWO, THREE], WEIGHTS), given, who, TOLERANCE
    who = "FLoRA, FedEx-LoRA, FedMomentum; not FedIT"
    yield "exact: the mean of the clients' updates", given, _mean(ALL, WEIGHTS), who, TOLERANCE
    best = {p: product.truncate(product.stack([a[p] for a in ALL], WEIGHTS), RANK).dense() for p in ONE}
    yield "the best approximation of its rank", given, best, "FlexLoRA and its kin", TOLERANCE
    mixed = [random_adapter(4, 1), random_adapter(5, 4), TWO]
    yield MIXED, (mixed, WEIGHTS), _mean(mixed, WEIGHTS), "FLoRA, FedMomentum", TOLERANCE
    many, even = [random_adapter(seed, dtype=torch.bfloat16) for seed in range(64)], [1.0] * 64
    wide = [{p: replace(m, a=m.a.double(), b=m.b.double()) for p, m in a.items()} for a in many]
    yield "bfloat16 is summed in float32 or better", (many, even), (wide, even), any_, 0.02


def examine(function: Aggregation) -> list[Finding]:
    """Try every identity on a function. An exception is a finding, not an end."""
    found = []
    for name, given, wanted, whose, tolerance in _identities():
        try:
            made = _result(function, *given)
            error = _distance(made, wanted if isinstance(wanted, dict) else _result(function, *wanted))
        except Exception as err:
            found.append(Finding(name, None, None, whose, f"{type(err).__name__}: {err}".splitlines()[0]))
            continue
        found.append(Finding(name, error <= tolerance, error, whose))
    return found
