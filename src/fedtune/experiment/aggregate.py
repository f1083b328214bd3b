"""Aggregate adapter folders that anybody made, without a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedtune.io import read_json, write_bytes, write_json
from fedtune.lora.product import stack
from fedtune.lora.state import AdapterState, to_tensors
from fedtune.methods import METHODS, Method, ServerState
from fedtune.models.adapter import CONFIG, WEIGHTS, read_state
from fedtune.types import ConfigError, FedtuneError, Problem, ProblemsError, nearest


@dataclass(frozen=True)
class Aggregated:
    """What came out.

    Attributes:
        adapter: the global adapter.
        weights: of the clients, summing to 1.
        error: relative distance of the effective update to the weighted mean of the clients' updates.
    """

    adapter: AdapterState
    weights: tuple[float, ...]
    error: float


def build(name: str, settings: Mapping[str, Any]) -> Method:
    """Return a method by name with its settings.

    Raises:
        ConfigError: unknown method or setting, with the nearest name.
    """
    if name not in METHODS:
        raise ConfigError("fedtune aggregate", [Problem(f"--method {name}", "unknown method", nearest(name, METHODS))])
    kind = METHODS[name]
    known = kind.Parameters.model_fields
    wrong = [
        Problem(f"--set {k}", f"{name} has no such setting", nearest(k, known)) for k in settings if k not in known
    ]
    if wrong:
        raise ConfigError("fedtune aggregate", wrong)
    try:
        return kind(kind.Parameters.model_validate(dict(settings)))
    except ValueError as err:
        raise ConfigError("fedtune aggregate", [Problem("--set", str(err))]) from err


def _odd(folder: Path, state: AdapterState, first: AdapterState, method: Method) -> list[Problem]:
    """Return what keeps one client's adapter from being aggregated with the first one's."""
    if set(state) != set(first):
        differing = sorted(set(state) ^ set(first))[:2]
        return [Problem(str(folder), f"adapts other layers than the first folder: {', '.join(differing)} …")]
    found = []
    for path, module in state.items():
        like = first[path]
        if (module.a.shape[1], module.b.shape[0]) != (like.a.shape[1], like.b.shape[0]):
            found.append(
                Problem(str(folder), f"{path} is {module.b.shape[0]} x {module.a.shape[1]}, another base model?")
            )
        elif module.rank != like.rank and not method.mixed_ranks:
            able = ", ".join(m for m in METHODS if METHODS[m].mixed_ranks)
            found.append(Problem(str(folder), f"rank {module.rank}, the first has {like.rank}", f"mixed ranks: {able}"))
        elif module.scale != like.scale and not method.mixed_ranks:
            # the factors alone would be averaged, as if all of them stood for the same update
            found.append(
                Problem(str(folder), f"scale (alpha over rank) {module.scale:g}, the first has {like.scale:g}")
            )
        elif module.magnitude is not None and not method.dora:
            found.append(Problem(str(folder), f"a DoRA adapter; {method.name} is not defined for magnitudes"))
        if not all(bool(torch.isfinite(t).all()) for t in (module.a, module.b)):
            found.append(Problem(str(folder), f"{path} has NaN or infinity"))
    return found[:3]


def _frozen(folders: Sequence[Path], states: Sequence[AdapterState], method: Method, round_: int) -> list[Problem]:
    """Return which clients do not share what the method keeps frozen in this round."""
    first = to_tensors(states[0])
    names = [n for n in first if not method.trainable(round_, n)]
    return [
        Problem(str(folder), f"{name} differs from the first folder's; {method.name} keeps it frozen and common")
        for folder, state in zip(folders[1:], states[1:], strict=True)
        for name in names[:1]
        if any(not torch.equal(to_tensors(state)[n], first[n]) for n in names)
    ]


def read_clients(folders: Sequence[Path], method: Method, round_: int) -> list[AdapterState]:
    """Read all folders, or report everything that is wrong with any of them.

    Raises:
        ProblemsError: the list.
    """
    problems: list[Problem] = []
    states: list[AdapterState] = []
    for folder in folders:
        try:
            states.append(read_state(folder))
        except FedtuneError as err:
            problems.append(Problem(str(folder), str(err)))
    if states and not problems:
        for folder, state in zip(folders, states, strict=True):
            problems += _odd(folder, state, states[0], method)
    if states and not problems:
        problems += _frozen(folders, states, method, round_)
    if problems or not states:
        raise ProblemsError("adapters cannot be aggregated", problems or [Problem("--clients", "names no folder")])
    return states


def relative_error(adapter: AdapterState, clients: Sequence[AdapterState], weights: Sequence[float]) -> float:
    """Return ||M - effective|| / ||M|| over all modules, M the weighted mean of the clients' updates."""
    gap = ideal = 0.0
    for path, module in adapter.items():
        mean = stack([c[path] for c in clients], weights).dense()
        mean = mean.T if module.conv1d else mean
        gap += float((mean - module.delta()).square().sum())
        ideal += float(mean.square().sum())
    return float((gap / ideal) ** 0.5) if ideal else 0.0


def aggregate(
    method: Method,
    clients: Sequence[AdapterState],
    examples: Sequence[int],
    start: AdapterState | None = None,
    round_: int = 1,
    rank: int = 0,
) -> Aggregated:
    """Aggregate adapters with a method's server half.

    Args:
        method: which.
        clients: their adapters.
        examples: of each; the weights are proportional.
        start: the global adapter they started from, for methods that refer to it; the first client's by default.
        round_: which round it is, for methods that alternate.
        rank: of the result where the method cuts ranks; 0 is the largest of the clients.
    """
    state = ServerState(start or clients[0], round_ - 1)
    after = method.aggregate(clients, examples, state, round_, rank)
    weights = [n / sum(examples) for n in examples]
    return Aggregated(after.adapter, tuple(weights), relative_error(after.adapter, clients, weights))


def write(result: Aggregated, like: Path, out: Path) -> None:
    """Write a PEFT folder with the settings of a client's, and the result's own rank and scale."""
    import safetensors.torch

    first = next(iter(result.adapter.values()))
    scale = {"r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora}
    config = {**read_json(like / CONFIG), **scale}
    write_json(out / CONFIG, config)
    tensors = {n: t.contiguous() for n, t in to_tensors(result.adapter).items()}
    write_bytes(out / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def write_effective(result: Aggregated, path: Path) -> None:
    """Write the dense update of every adapted weight, float32, in the orientation of the weight it is added to."""
    import safetensors.torch

    dense = {name: m.delta().to(torch.float32).contiguous() for name, m in result.adapter.items()}
    write_bytes(path, safetensors.torch.save(dense))
