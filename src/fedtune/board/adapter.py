"""The adapter of a packed run, held against its settings and its base model by its header alone. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedtune.board.archive import is_clutter
from fedtune.methods import METHODS
from fedtune.methods.traits import moves_base
from fedtune.models.adapter_config import LoraAdapterConfig, read_config
from fedtune.models.source import not_a_number
from fedtune.models.zoo import HEAD, zoo
from fedtune.names import PREFIX, A, B, M
from fedtune.results.entry import Entry
from fedtune.tensors import tensor_header
from fedtune.types import AdapterError, FedtuneError, Problem

ADAPTER, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
_TENSOR = re.compile(f"{re.escape(PREFIX)}(.+)({'|'.join(map(re.escape, (A, B, M)))})")
MAX_LAYERS, MAX_NAME, MAX_PARTS = 20_000, 1_000, 40  # layers of an adapter, letters and parts of a layer's path

# of each adapted layer its path in the base model: its shape (in, out)
Layers = dict[str, tuple[int, int]]


class Saved(dict[str, tuple[int, int, int]]):
    """(in, out, rank) of each adapted layer by its path; `magnitudes` are the layers that have DoRA's."""

    magnitudes: frozenset[str] = frozenset()


def saved(folder: Path) -> Saved:
    """Read the layers of a packed run's adapter from its header.

    Raises:
        AdapterError: a tensor that is no factor, a factor without its other, shapes that do not fit, or more layers or
            longer names than any model has.
        CorruptFileError: a damaged file.
    """
    parts: dict[str, dict[str, list[int]]] = {}
    header = tensor_header(folder / ADAPTER)
    if len(header) > 3 * MAX_LAYERS:
        raise AdapterError(f"{ADAPTER}: has {len(header):,} tensors, at most {3 * MAX_LAYERS:,} are taken")
    for name, entry in header.items():
        if len(name) > MAX_NAME or name.count(".") >= MAX_PARTS:
            most = f"at most {MAX_NAME:,} letters and {MAX_PARTS} parts are taken"
            raise AdapterError(f"{ADAPTER}: {name[:200]}... is no layer's name: {most}")
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise AdapterError(f"{ADAPTER}: {name[:200]} is no factor of an adapter")
        if entry["dtype"] not in FLOATS:
            raise AdapterError(
                f"{ADAPTER}: {name[:200]} is {entry['dtype']}, one of {', '.join(sorted(FLOATS))} wanted"
            )
        parts.setdefault(found[1], {})[found[2]] = entry["shape"]
    layers = Saved({path: _shape(path, own) for path, own in parts.items()})
    layers.magnitudes = frozenset(path for path, own in parts.items() if M in own)
    return layers


def _shape(path: str, own: Mapping[str, list[int]]) -> tuple[int, int, int]:
    a, b = own.get(A, []), own.get(B, [])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or own.get(M, b[:1]) != b[:1]:
        raise AdapterError(f"{ADAPTER}: {path[:200]}: A is {a} and B {b}; they do not multiply")
    return a[1], b[0], a[0]


def _ends(path: str) -> set[str]:
    """Return every name by which a target means a layer: its path, and each end of it that begins after a dot."""
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def of_base(entry: Entry) -> Layers | None:
    """Return the layers of the base model that the settings adapt; None where they are not known here."""
    base = zoo().get(entry.base)
    targets = set(entry.settings.lora.target_modules or (base.targets if base else ()))
    if base is None or not targets:
        return None
    each = base.linears()
    if targets == {"all-linear"}:
        return {path: shape for path, shape in each.items() if path != HEAD}
    return {path: shape for path, shape in each.items() if _ends(path) & targets}


def _kept(entry: Entry) -> bool:
    """Tell whether a run of these settings leaves one adapter for all."""
    return entry.settings.arm != "federated" or METHODS[entry.method].models != "own"


def adapter_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield an adapter that lacks, or that the settings do not make of the base model: its names, shapes and ranks."""
    if (kind := entry.settings.peft.kind) != "lora":
        yield Problem("config.toml", f'peft.kind = "{kind}"; only LoRA runs can be submitted')
        return
    there = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    for name in sorted(p for p in there if p.suffix == ".safetensors" or p.parts[0] == "adapter"):
        if str(name) not in (ADAPTER, CONFIG) and not is_clutter(name):
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
    if not isinstance(config, LoraAdapterConfig):
        yield Problem(CONFIG, f"is of kind {config.kind}, the settings say LoRA")
        return
    if spoilt:
        yield Problem(ADAPTER, f"{spoilt} has NaN or infinity; no model can have been evaluated with it")
    yield from (Problem(CONFIG, why) for why in _config_problems(config, layers, entry))
    yield from (Problem(ADAPTER, why) for why in _layer_problems(layers, entry))
    lora = entry.settings.lora
    trained = sum(lora.r * (i + o) + (o if lora.dora else 0) for i, o, _ in layers.values())
    if entry.costs.trainable_parameters != trained:
        said = entry.costs.trainable_parameters
        yield Problem("entry.costs.trainable_parameters", f"is {said}, its layers have {trained}")


def _grows(entry: Entry) -> bool:
    """Tell whether the adapter holds what was moved into the base model too: it has a rank and a scale of its own."""
    return entry.settings.arm == "federated" and moves_base(METHODS[entry.method])


def _config_problems(config: LoraAdapterConfig, layers: Saved, entry: Entry) -> Iterator[str]:
    """Yield what an adapter's settings say that its file or the run's settings do not."""
    lora = entry.settings.lora
    if config.base != entry.base and Path(config.base).name != Path(entry.base).name:
        yield f"was made for {config.base!r}, the entry says {entry.base!r}"
    if config.revision not in (None, "", entry.revision):
        yield f"was made for revision {config.revision[:80]!r}, the entry says {entry.revision!r}"
    narrowed = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern")
    # layer 0 alone is written as a number, which is false
    if odd := [name for name in narrowed if getattr(config, name) not in (None, [], {}, "")]:
        yield f"{odd[0]} is set; a run sets none"
    if other := [path for path, (_, _, rank) in layers.items() if rank != config.r]:
        yield f"r is {config.r}, {other[0][:200]} has rank {layers[other[0]][2]}"
    yield from _scale_problems(config, entry)
    if config.lora_dropout != lora.dropout:
        yield f"lora_dropout is {config.lora_dropout}, the settings say {lora.dropout}"
    if config.fan_in_fan_out and zoo().get(entry.base):
        yield "fan_in_fan_out is set; the base model has no such layer"
    if config.use_dora != lora.dora or layers.magnitudes != (frozenset(layers) if lora.dora else frozenset()):
        yield f"the settings say dora = {str(lora.dora).lower()}, the adapter is another"
    if not isinstance(config.target_modules, list):
        yield "target_modules is no list of names; a run writes one"
    elif odd := _unlike(set(config.target_modules), layers):
        yield f"target_modules and the layers in the file are not the same: {odd[0][:200]}"


def _scale_problems(config: LoraAdapterConfig, entry: Entry) -> Iterator[str]:
    """Yield an alpha or a kind of scale that no run of these settings leaves: only both together make the scale."""
    lora, said = entry.settings.lora, (config.lora_alpha, config.use_rslora)
    grows = _grows(entry)
    # what was moved into the base model has the scale 1, unless nothing was moved
    pairs = [(float(config.r), False)] if grows else []
    if not grows or config.r == lora.r:
        pairs.append((lora.alpha, lora.rslora))
    if said in pairs:
        return
    alpha, rslora = pairs[-1]
    if said[0] != alpha:
        yield f"lora_alpha is {said[0]}, the settings say {alpha}"
    if said[1] != rslora:
        yield f"use_rslora is {said[1]}, the settings say {rslora}"


def _unlike(targets: set[str], layers: Mapping[str, object]) -> list[str]:
    """Return the targets that mean no layer, and the layers that no target means; each sorted."""
    left, bare = set(targets), []
    for path in layers:
        meant = _ends(path) & targets
        left -= meant
        bare += [] if meant else [path]
    return sorted(left) + sorted(bare)


def _layer_problems(layers: Saved, entry: Entry) -> Iterator[str]:
    """Yield layers that are not those of the settings or of the base model, by path, shape and rank."""
    lora, wanted = entry.settings.lora, of_base(entry)
    found = {path: shape[:2] for path, shape in layers.items()}
    if wanted is not None and found != wanted:
        odd = min((path for path, _ in found.items() ^ wanted.items()), default="")
        yield f"its {len(found)} layers are not the {len(wanted)} that the settings adapt: {odd[:200]}"
    targets = set(lora.target_modules)
    # a target with dots may mean no layer, as long as its last part is a name of the model
    unlike = _unlike(targets, layers) if targets and targets != {"all-linear"} else []
    if odd := next((name for name in unlike if name in layers), ""):
        yield f"{odd[:200]} is no layer that lora.target_modules names"
    elif odd := next((name for name in unlike if "." not in name), ""):
        yield f"has no layer {odd[:200]}, which lora.target_modules names"
    # a method that moves the base model leaves a rank of at most a layer's full one
    full = max((min(i, o) for i, o, _ in layers.values()), default=0)
    least = min(lora.r, full) if _grows(entry) else lora.r
    most = max(lora.r, full) if _grows(entry) else lora.r
    ranks = {rank for _, _, rank in layers.values()} or {0}
    if min(ranks) < least or max(ranks) > most:
        rank = min(ranks) if min(ranks) < least else max(ranks)
        yield f"has a layer of rank {rank}, the settings say {lora.r}"
