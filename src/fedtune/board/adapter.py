"""The adapter of a packed run, held against its settings and its base model by its header alone. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedtune import spaces
from fedtune.board.archive import inside
from fedtune.methods import METHODS
from fedtune.methods.traits import moves_base
from fedtune.models.adapter_config import read_config
from fedtune.models.source import not_a_number
from fedtune.results.entry import Entry
from fedtune.spaces.saved import Layers
from fedtune.tensors import tensor_header
from fedtune.types import AdapterError, FedtuneError, Problem

ADAPTER, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"


def saved(folder: Path, entry: Entry) -> Layers:
    """Read the layers of a packed run's adapter from its header.

    Raises:
        AdapterError: tensors that no run of its space leaves, or more or longer names than any model has.
        CorruptFileError: a damaged file.
    """
    header = tensor_header(folder / ADAPTER)
    try:
        return spaces.of(entry.settings).layers(header)
    except AdapterError as err:
        raise AdapterError(f"{ADAPTER}: {err}") from err


def _kept(entry: Entry) -> bool:
    """Tell whether a run of these settings leaves one adapter for all."""
    return entry.settings.arm != "federated" or METHODS[entry.method].models != "own"


def adapter_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield an adapter that lacks, or that the settings do not make of the base model: its names, shapes and ranks."""
    space = spaces.of(entry.settings)
    if space.unsubmitted:
        yield Problem("config.toml", f'peft.kind = "{space.name}"; {space.unsubmitted}')
        return
    for name in (p.relative_to(folder) for p in inside(folder)):
        if (name.suffix == ".safetensors" or name.parts[0] == "adapter") and str(name) not in (ADAPTER, CONFIG):
            yield Problem(str(name), "is no part of the adapter that a run leaves")
    if not (folder / ADAPTER).is_file():
        if _kept(entry):
            yield Problem(ADAPTER, f"is missing; {entry.method} leaves an adapter")
        return
    if not _kept(entry):
        yield Problem(ADAPTER, f"is of no model that was evaluated; {entry.method} leaves none")
        return
    try:
        config, layers = read_config(folder / "adapter"), saved(folder, entry)
        spoilt = not_a_number(folder / ADAPTER)
    except FedtuneError as err:
        yield Problem("adapter", str(err).replace(f"{folder}/", ""))
        return
    if spoilt:
        yield Problem(ADAPTER, f"{spoilt} has NaN or infinity; no model can have been evaluated with it")
    # with what was moved into the base model too, it has a rank and a scale of its own
    grown = entry.settings.arm == "federated" and moves_base(METHODS[entry.method])
    for file, why in space.saved_problems(config, layers, entry, grown=grown):
        yield Problem(f"adapter/{file}", why)
    trained = sum(sum(space.numbers(shape, entry.settings)) for shape in layers.values())
    if entry.costs.trainable_parameters != trained:
        said = entry.costs.trainable_parameters
        yield Problem("entry.costs.trainable_parameters", f"is {said}, its layers have {trained}")
