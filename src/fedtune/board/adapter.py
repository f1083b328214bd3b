"""The adapter of a packed run, held against its settings and its base model by its header alone. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedtune.board.archive import litter
from fedtune.methods import METHODS
from fedtune.models.adapter_config import AdapterConfig, read_config
from fedtune.models.source import not_a_number
from fedtune.models.zoo import zoo
from fedtune.results.entry import Entry
from fedtune.tensors import tensor_header
from fedtune.types import AdapterError, FedtuneError, Problem

ADAPTER, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
_TENSOR = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?(\w+)")

# of each adapted layer its number in the base model and its name: its shape (in, out)
Layers = dict[tuple[int, str], tuple[int, int]]


class Saved(dict[str, tuple[int, int, int]]):
    """(in, out, rank) of each adapted layer by its path; `magnitudes` are the layers that have DoRA's."""

    magnitudes: frozenset[str] = frozenset()


def saved(folder: Path) -> Saved:
    """Read the layers of a packed run's adapter from its header.

    Raises:
        AdapterError: a tensor that is no factor, a factor without its other, or shapes that do not fit.
        CorruptFileError: a damaged file.
    """
    parts: dict[str, dict[str, list[int]]] = {}
    for name, entry in tensor_header(folder / ADAPTER).items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise AdapterError(f"{ADAPTER}: {name[:200]} is no factor of an adapter")
        if entry["dtype"] not in FLOATS:
            raise AdapterError(
                f"{ADAPTER}: {name[:200]} is {entry['dtype']}, one of {', '.join(sorted(FLOATS))} wanted"
            )
        parts.setdefault(found[1], {})[found[2]] = entry["shape"]
    layers = Saved({path: _shape(path, own) for path, own in parts.items()})
    layers.magnitudes = frozenset(path for path, own in parts.items() if "lora_magnitude_vector" in own)
    return layers


def _shape(path: str, own: Mapping[str, list[int]]) -> tuple[int, int, int]:
    a, b = own.get("lora_A.weight", []), own.get("lora_B.weight", [])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or own.get("lora_magnitude_vector", b[:1]) != b[:1]:
        raise AdapterError(f"{ADAPTER}: {path[:200]}: A is {a} and B {b}; they do not multiply")
    return a[1], b[0], a[0]


def of_base(entry: Entry) -> Layers | None:
    """Return the layers of the base model that the settings adapt; None where they are not known here."""
    base = zoo().get(entry.base)
    targets = entry.config["lora"]["target_modules"] or (base.targets if base else ())
    try:
        each = {name: base.linear(name)[::-1] for name in targets} if base else {}
    except KeyError:
        return None
    return {(i, name): each[name] for i in range(base.layers) for name in each} if base and each else None


def _kept(entry: Entry) -> bool:
    """Tell whether a run of these settings leaves one adapter for all."""
    return entry.config["arm"] != "federated" or METHODS[entry.method].global_adapter


def adapter_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield an adapter that lacks, or that the settings do not make of the base model: its names, shapes and ranks."""
    there = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    for name in sorted(p for p in there if p.suffix == ".safetensors" or p.parts[0] == "adapter"):
        if str(name) not in (ADAPTER, CONFIG) and not litter(name):
            yield Problem(str(name), "is no part of the adapter that a run leaves")
    if not (folder / ADAPTER).is_file():
        if _kept(entry):
            yield Problem(ADAPTER, f"is missing; {entry.method} leaves an adapter")
        return
    if not _kept(entry):
        yield Problem(ADAPTER, f"is of no model that was evaluated; {entry.method} leaves none")
        return
    try:
        config, layers = read_config(folder / "adapter"), saved(folder)
        spoilt = not_a_number(folder / ADAPTER)
    except FedtuneError as err:
        yield Problem("adapter", str(err).replace(f"{folder}/", ""))
        return
    if spoilt:
        yield Problem(ADAPTER, f"{spoilt} has NaN or infinity; no model can have been evaluated with it")
    yield from (Problem(CONFIG, why) for why in _config_problems(config, layers, entry))
    yield from (Problem(ADAPTER, why) for why in _layer_problems(layers, entry))
    lora = entry.config["lora"]
    trained = sum(lora["r"] * (i + o) + (o if lora["dora"] else 0) for i, o, _ in layers.values())
    if entry.costs.trainable_parameters != trained:
        said = entry.costs.trainable_parameters
        yield Problem("entry.costs.trainable_parameters", f"is {said}, its layers have {trained}")


def _grows(entry: Entry) -> bool:
    """Tell whether the adapter holds what was moved into the base model too: it has a rank and a scale of its own."""
    return entry.config["arm"] == "federated" and METHODS[entry.method].keeps_base


def _config_problems(config: AdapterConfig, layers: Saved, entry: Entry) -> Iterator[str]:
    """Yield what an adapter's settings say that its file or the run's settings do not."""
    lora = entry.config["lora"]
    if config.base != entry.base and Path(config.base).name != Path(entry.base).name:
        yield f"was made for {config.base!r}, the entry says {entry.base!r}"
    narrowed = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern")
    if odd := [name for name in narrowed if getattr(config, name)]:
        yield f"{odd[0]} is set; a run sets none"
    if other := [path for path, (_, _, rank) in layers.items() if rank != config.r]:
        yield f"r is {config.r}, {other[0][:200]} has rank {layers[other[0]][2]}"
    if config.lora_alpha != lora["alpha"] and not (_grows(entry) and config.lora_alpha == config.r):
        yield f"lora_alpha is {config.lora_alpha}, the settings say {lora['alpha']}"
    if config.use_rslora != lora["rslora"] and not _grows(entry):
        yield f"use_rslora is {config.use_rslora}, the settings say {lora['rslora']}"
    if config.use_dora != lora["dora"] or layers.magnitudes != (frozenset(layers) if lora["dora"] else frozenset()):
        yield f"the settings say dora = {str(lora['dora']).lower()}, the adapter is another"
    if isinstance(config.target_modules, list):
        named = {t for t in config.target_modules for path in layers if f".{path}".endswith(f".{t}")}
        covered = {path for path in layers for t in named if f".{path}".endswith(f".{t}")}
        if odd := sorted({*config.target_modules} - named) + sorted(layers.keys() - covered):
            yield f"target_modules and the layers in the file are not the same: {odd[0][:200]}"


def _layer_problems(layers: Saved, entry: Entry) -> Iterator[str]:
    """Yield layers that are not those of the settings or of the base model, by name, shape and rank."""
    lora, wanted = entry.config["lora"], of_base(entry)
    named = [(_LAYER.fullmatch(path), shape[:2]) for path, shape in layers.items()]
    if wanted is not None:
        found = {(int(name[1]), name[2]): shape for name, shape in named if name}
        if found != wanted or len(named) != len(wanted):
            yield f"its {len(named)} layers are not the {len(wanted)} that the settings adapt"
    ends = tuple(f".{target}" for target in lora["target_modules"])
    if ends != (".all-linear",) and ends and (odd := [path for path in layers if not f".{path}".endswith(ends)]):
        yield f"{odd[0][:200]} is no layer that lora.target_modules names"
    # a method that moves the base model leaves a rank of at most a layer's full one; clients may have cut their ranks
    full = max((min(i, o) for i, o, _ in layers.values()), default=0)
    least = min(lora["r"], full) if _grows(entry) else lora["r"]
    least = 1 if entry.config["arm"] == "federated" and METHODS[entry.method].ragged else least
    most = max(lora["r"], full) if _grows(entry) else lora["r"]
    ranks = {rank for _, _, rank in layers.values()} or {0}
    if min(ranks) < least or max(ranks) > most:
        rank = min(ranks) if min(ranks) < least else max(ranks)
        yield f"has a layer of rank {rank}, the settings say {lora['r']}"
