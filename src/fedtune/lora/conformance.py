"""Which identities an aggregation of LoRA adapters keeps: checks that anybody can run on their own code.

The function under test takes a list of PEFT states (name -> tensor, as in `adapter_model.safetensors`) and a list of
weights, and returns one state. Every state has alpha = rank, so that a state's delta is B A; the states are random,
float64, and not square. A result of another rank than the clients' is fine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def _best(adapters: Sequence[AdapterState], weights: Sequence[float], rank: int) -> dict[str, Tensor]:
    return {p: product.truncate(product.stack([a[p] for a in adapters], weights), rank).dense() for p in adapters[0]}


ONE, TWO, THREE = (random_adapter(seed) for seed in (1, 2, 3))
WEIGHTS = [1.0, 2.0, 5.0]
Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


def _one_client(f: Aggregation) -> Pair:
    return _result(f, [ONE], [7.0]), _deltas(ONE)


def _identical(f: Aggregation) -> Pair:
    return _result(f, [ONE, ONE, ONE], WEIGHTS), _deltas(ONE)


def _permuted(f: Aggregation) -> Pair:
    return _result(f, [THREE, ONE, TWO], [5.0, 1.0, 2.0]), _result(f, [ONE, TWO, THREE], WEIGHTS)


def _rescaled(f: Aggregation) -> Pair:
    return _result(f, [ONE, TWO, THREE], [10.0, 20.0, 50.0]), _result(f, [ONE, TWO, THREE], WEIGHTS)


def _doubled(f: Aggregation) -> Pair:
    return _result(f, [ONE, TWO, TWO], [1.0, 1.0, 1.0]), _result(f, [ONE, TWO], [1.0, 2.0])


def _twice(f: Aggregation) -> Pair:
    return _result(f, [ONE, TWO, THREE], WEIGHTS), _result(f, [ONE, TWO, THREE], WEIGHTS)


def _gauge(f: Aggregation) -> Pair:
    turn = torch.tensor([[2.0, 1.0, 0.0], [0.5, -3.0, 1.0], [0.0, 1.0, 0.25]], dtype=torch.float64)
    moved = {p: product.regauge(m, turn) for p, m in ONE.items()}
    return _result(f, [moved, TWO, THREE], WEIGHTS), _result(f, [ONE, TWO, THREE], WEIGHTS)


def _exact(f: Aggregation) -> Pair:
    return _result(f, [ONE, TWO, THREE], WEIGHTS), _mean([ONE, TWO, THREE], WEIGHTS)


def _eckart_young(f: Aggregation) -> Pair:
    return _result(f, [ONE, TWO, THREE], WEIGHTS), _best([ONE, TWO, THREE], WEIGHTS, RANK)


def _common_a(f: Aggregation) -> Pair:
    shared = [{p: replace(m, a=ONE[p].a) for p, m in a.items()} for a in (ONE, TWO, THREE)]
    return _result(f, shared, WEIGHTS), _mean(shared, WEIGHTS)


def _mixed_ranks(f: Aggregation) -> Pair:
    mixed = [random_adapter(4, 1), random_adapter(5, 4), TWO]
    got = _result(f, mixed, WEIGHTS)
    return got, _mean(mixed, WEIGHTS)


def _half(f: Aggregation) -> Pair:
    many = [random_adapter(seed, dtype=torch.bfloat16) for seed in range(64)]
    wide = [{p: replace(m, a=m.a.double(), b=m.b.double()) for p, m in a.items()} for a in many]
    return _result(f, many, [1.0] * 64), _result(f, wide, [1.0] * 64)


COMMON_A = "exact where A is common"
# of a method that is meant to stay near where it started, these do not hold
FIXED_POINTS = ("one client is its own model", "identical clients are a fixed point")
CHECKS: tuple[tuple[str, Callable[[Aggregation], Pair], float, str], ...] = (
    (FIXED_POINTS[0], _one_client, TOLERANCE, "any aggregation"),
    (FIXED_POINTS[1], _identical, TOLERANCE, "any aggregation"),
    ("the order of clients does not matter", _permuted, TOLERANCE, "any aggregation"),
    ("only the ratio of weights counts", _rescaled, TOLERANCE, "any weighted aggregation"),
    ("a doubled client is a doubled weight", _doubled, TOLERANCE, "any weighted aggregation"),
    ("the same call gives the same result", _twice, 0.0, "any aggregation"),
    (COMMON_A, _common_a, TOLERANCE, "any; methods with a frozen factor rest on it"),
    ("a client's change of gauge changes nothing", _gauge, TOLERANCE, "methods in product space; not FedIT"),
    ("exact: the mean of the clients' updates", _exact, TOLERANCE, "FLoRA, FedEx-LoRA, FedMomentum; not FedIT"),
    ("the best approximation of its rank", _eckart_young, TOLERANCE, "FlexLoRA and its kin"),
    ("exact with mixed ranks", _mixed_ranks, TOLERANCE, "FLoRA, FedMomentum"),
    ("bfloat16 is summed in float32 or better", _half, 0.02, "any aggregation"),
)


def examine(function: Aggregation) -> list[Finding]:
    """Try every identity on a function. An exception is a finding, not an end."""
    found = []
    for name, check, tolerance, who in CHECKS:
        try:
            error = _distance(*check(function))
        except Exception as err:
            found.append(Finding(name, None, None, who, f"{type(err).__name__}: {err}".splitlines()[0]))
            continue
        found.append(Finding(name, error <= tolerance, error, who))
    return found
