"""Aggregate folders that anybody made; without a base model unless they are DoRA's."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedtune.experiment import by_tensor
from fedtune.experiment.by_tensor import ByTensor, check_finite, renamed
from fedtune.experiment.clients import Weights
from fedtune.io import write_bytes, write_json
from fedtune.lora import dora, product
from fedtune.lora.base_delta import as_adapter, effective
from fedtune.lora.state import AdapterState, LoraModule, Plain, rescaled, to_tensors, with_tensors
from fedtune.methods import METHODS, Method, ServerState, aggregation, unknown
from fedtune.methods.traits import magnitudes
from fedtune.models.folder import FolderPlain
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.results.bounds import LARGEST_INT
from fedtune.types import AdapterError, ConfigError, Problem, nearest


@dataclass(frozen=True)
class Aggregated:
    """What came out.

    Attributes:
        state: the server's: adapter and what is moved into the base.
        personal: each client's own adapter, where there is no global one; else None.
        weights: of the clients, summing to 1.
        error: relative distance of the effective update to the weighted mean of the clients' updates; None where
            there is no global model, or its tensors are no factors and are what is averaged.
        base: layer -> its base weight [out, in], where one was given.
        folders: those to load, once it is written: the global adapter's, or each client's.
    """

    state: ServerState
    personal: list[AdapterState] | None
    weights: tuple[float, ...]
    error: float | None
    base: Weights | None = None
    folders: tuple[Path, ...] = ()

    @property
    def adapter(self) -> AdapterState:
        """The global model as one adapter."""
        return as_adapter(self.state.adapter, self.state.base)

    @property
    def plain(self) -> ByTensor | None:
        """The tensors, where they are no factors; each is aggregated when it is asked for."""
        made = self.state.adapter
        return made.tensors if isinstance(made, Plain) and isinstance(made.tensors, ByTensor) else None


def build(name: str, settings: Mapping[str, Any]) -> Method:
    """Return a method by name with its settings. Raises ConfigError: an unknown name, and the nearest."""
    if name not in METHODS:
        raise ConfigError("command line", [Problem(f"--method {name}", "unknown method", unknown(name))])
    kind = METHODS[name]
    known = kind.Parameters.model_fields
    if strange := [k for k in settings if k not in known]:
        wrong = [Problem(f"--set {k}", f"{name} has no such setting", nearest(k, known)) for k in strange]
        raise ConfigError("command line", wrong)
    try:
        return kind(kind.Parameters.model_validate(dict(settings)))
    except ValueError as err:
        raise ConfigError("command line", [Problem("--set", str(err))]) from err


def relative_error(state: ServerState, clients: Sequence[AdapterState], weights: Sequence[float]) -> float:
    """Return ||M - effective|| / ||M|| over all layers, M the weighted mean of the clients' updates.

    Through factors, layer by layer; nothing dense is built.
    """
    gap = ideal = 0.0
    for path, made in effective(state.adapter, state.base).items():
        mean = product.stack([c[path] for c in clients], weights)
        gap += product.norm(product.total(mean, product.minus(made))) ** 2
        ideal += product.norm(mean) ** 2
    return float((gap / ideal) ** 0.5) if ideal else 0.0


def aggregate(
    method: Method,
    clients: Sequence[AdapterState],
    examples: Sequence[float],
    start: AdapterState | None = None,
    round_: int = 1,
    rank: int = 0,
    base: Weights | None = None,
) -> Aggregated:
    """Aggregate clients' adapters with a method's server half; what its parameters are, `fedtune.aggregate` says.

    Methods that refer to the adapter the clients started from have the first client's by default. DoRA adapters need
    the base model's weights, [out, in] of each layer, where the method maps them exactly.

    Raises:
        ConfigError: there is no client, or not one count of examples above 0 for each.
        AdapterError: the method cannot aggregate these numbers.
    """
    if not clients or len(examples) != len(clients) or not all(0 < n <= LARGEST_INT for n in examples):
        what = f"{len(clients)} clients with examples {short(list(examples))}"
        raise ConfigError("fedtune aggregate", [Problem("clients", what, "it takes one or more, each with examples")])
    weights = tuple(n / sum(examples) for n in examples)
    if plain := [client for client in clients if isinstance(client, FolderPlain)]:
        begun = start if isinstance(start, FolderPlain) else plain[0]
        made = Plain(begun.space, ByTensor(method, plain, examples, begun, round_))
        return Aggregated(ServerState(made, round_), None, weights, None)
    relative: dict[str, Tensor] = {}
    if magnitudes(type(method)) == "exact" and any(m.magnitude is not None for m in clients[0].values()):
        if base is None:
            raise ValueError("DoRA adapters need the base model's weights")
        clients, relative = _divided(clients, examples, base)
    try:
        before = ServerState(dict(start or clients[0]), round_ - 1)
        after, personal = aggregation.aggregate(method, clients, examples, before, rank)
        error = relative_error(after, clients, weights) if personal is None else None
    except (torch.linalg.LinAlgError, ArithmeticError) as err:  # type: ignore[attr-defined]
        why = " ".join(str(err).split())
        raise AdapterError(f"{method.name} cannot aggregate these adapters' values: {why}") from err
    if relative and base is not None:
        after = replace(after, adapter=_with_magnitudes(after.adapter, relative, base))
    return Aggregated(after, None if personal is None else list(personal), weights, error, base)


def _norms(path: str, module: LoraModule, base: Weights) -> Tensor:
    fits = (module.b.shape[0], module.a.shape[1])
    if base(path).shape != fits:
        raise AdapterError(f"{path}: the adapters are of {fits}, the base model has {tuple(base(path).shape)}")
    return dora.row_norms(base(path), module.scale * (module.b.float() @ module.a.float()))


def _divided(
    clients: Sequence[AdapterState], examples: Sequence[float], base: Weights
) -> tuple[list[AdapterState], dict[str, Tensor]]:
    """Return DoRA adapters as the LoRA factors the exact map averages, and the mean relative magnitudes."""
    sent = [
        dora.to_wire(to_tensors(client), {path: _norms(path, m, base) for path, m in client.items()})
        for client in clients
    ]
    try:
        changed, relative = dora.divided(sent, list(examples))
    except ValueError as err:
        raise AdapterError(f"DoRA adapters that cannot be averaged: {err}; look at their magnitudes") from err
    return [with_tensors(c, t) for c, t in zip(clients, changed, strict=True)], relative


def _with_magnitudes(adapter: AdapterState, relative: Mapping[str, Tensor], base: Weights) -> AdapterState:
    tensors = {**to_tensors(adapter), **relative}
    norms = {path: _norms(path, module, base) for path, module in adapter.items()}
    return with_tensors(adapter, dora.to_magnitudes(tensors, norms))


def write(result: Aggregated, like: Path, out: Path, base: str | None = None) -> list[Path]:
    """Write a folder with the settings of a client's; of factors with the result's own rank and scale.

    A base model's name given here takes the place of the client's. Where there is no global adapter, `out` has what is
    shared (FedSA-LoRA's mean A with B = 0, FedALT's mean), and a folder below it each client's own.

    Returns:
        The folders to load: the global adapter's, or each client's.

    Raises:
        AdapterError: it is not finite; nothing is written then.
    """
    if result.plain is not None:
        by_tensor.write(result.plain, out, base)
        return [out]
    adapters = {out: result.adapter}
    adapters |= {out / f"client-{i}": adapter for i, adapter in enumerate(result.personal or [])}
    # all before any of them is written
    files = {folder: _file(adapter, folder) for folder, adapter in adapters.items()}
    for folder, (scale, tensors) in files.items():
        write_json(folder / CONFIG, {**renamed(like, base), **scale})
        write_bytes(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    return [out] if result.personal is None else list(adapters)[1:]


def _file(adapter: AdapterState, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings of an adapter's scale, and its tensors, all on that scale: a file has a single alpha."""
    first = next(iter(adapter.values()))
    tensors = to_tensors({path: rescaled(m, first) for path, m in adapter.items()})
    check_finite(tensors, str(folder))
    scale = {"r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora}
    return scale, {n: t.contiguous() for n, t in tensors.items()}


def dense_update(result: Aggregated) -> dict[str, Tensor]:
    """Return the dense update of every adapted weight, float32, in the orientation of the weight it is added to.

    Raises:
        ConfigError: the method has no single global model, or magnitudes need the base model.
        AdapterError: it is not finite.
    """
    if result.plain is not None:
        what = "there are no factors, whose product would be an update"
        raise ConfigError("fedtune aggregate", [Problem("--effective", what, "leave it out")])
    if result.error is None:
        what = "the method has no single global model"
        raise ConfigError("fedtune aggregate", [Problem("--effective", what, "its clients' adapters are in --out")])
    dense = {}
    for path, whole in effective(result.state.adapter, result.state.base).items():
        module, delta = result.state.adapter[path], whole.dense().to(torch.float32)
        if module.magnitude is not None:
            delta = _dora_update(path, module, delta, result.base)
        dense[path] = (delta.T if module.conv1d else delta).contiguous()
    check_finite(dense, "--effective")
    return dense


def _dora_update(path: str, module: LoraModule, delta: Tensor, base: Weights | None) -> Tensor:
    if module.magnitude is None or base is None:
        what = "a DoRA update depends on the base model's weights"
        raise ConfigError("fedtune aggregate", [Problem("--effective", what, "give --base MODEL")])
    weight = base(path).float()
    moved = weight + delta
    update: Tensor = module.magnitude.float()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
    return update


def write_dense(dense: Mapping[str, Tensor], path: Path) -> None:
    """Write dense updates as safetensors, named by the modules' paths."""
    write_bytes(path, safetensors.torch.save(dict(dense)))


def base_weights(name: str) -> Weights:
    """Return what reads a base model's weights by layer [out, in]; the model is loaded when the first is asked for.

    Raises:
        ModelError, OfflineError: it cannot be had, then.
    """

    @functools.cache
    def model() -> Any:
        from fedtune.config.schema import ModelSettings
        from fedtune.models.load import load

        return load(ModelSettings(name=name)).model

    def weight(path: str) -> Tensor:
        try:
            layer = model().get_submodule(path)
        except AttributeError as err:
            raise AdapterError(f"--base {name} has no layer {path}; the adapters are another model's") from err
        value: Tensor = layer.weight.detach()
        return value.T if type(layer).__name__ == "Conv1D" else value

    return weight
