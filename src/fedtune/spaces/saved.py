"""An adapter's file, by its header alone, held against its settings and its base model. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.models.zoo import HEAD, zoo
from fedtune.names import PREFIX
from fedtune.types import AdapterError

if TYPE_CHECKING:
    from fedtune.models.adapter_config import AdapterConfig
    from fedtune.results.entry import Entry

# what each layer has, by its path in the base model: (in, out) and what else a space says
Layers = Mapping[str, tuple[int, ...]]
MAX_LAYERS, MAX_NAME, MAX_PARTS = 20_000, 1_000, 40  # layers of an adapter, letters and parts of a layer's path
FLOATS = {"F64", "F32", "F16", "BF16"}


def by_layer(header: Mapping[str, Any], tails: Sequence[str], what: str) -> dict[str, dict[str, list[int]]]:
    """Return the shapes of an adapter's tensors by the path of their layer and the end of their name.

    Args:
        header: of the file.
        tails: the ends that names may have.
        what: such a tensor is called.

    Raises:
        AdapterError: a tensor of another name or dtype, or more layers or longer names than any model has.
    """
    parts: dict[str, dict[str, list[int]]] = {}
    if len(header) > len(tails) * MAX_LAYERS:
        raise AdapterError(f"has {len(header):,} tensors, at most {len(tails) * MAX_LAYERS:,} are taken")
    for name, entry in header.items():
        if len(name) > MAX_NAME or name.count(".") >= MAX_PARTS:
            most = f"at most {MAX_NAME:,} letters and {MAX_PARTS} parts are taken"
            raise AdapterError(f"{name[:200]}... is no layer's name: {most}")
        tail = next((tail for tail in tails if name.endswith(tail)), "")
        path = name.removeprefix(PREFIX).removesuffix(tail)
        if not tail or not path or not name.startswith(PREFIX):
            raise AdapterError(f"{name[:200]} is no {what} of an adapter")
        if entry["dtype"] not in FLOATS:
            raise AdapterError(f"{name[:200]} is {entry['dtype']}, one of {', '.join(sorted(FLOATS))} wanted")
        parts.setdefault(path, {})[tail] = entry["shape"]
    return parts


def ends(path: str) -> set[str]:
    """Return every name by which a target means a layer: its path, and each end of it that begins after a dot."""
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def linears(entry: Entry, targets: Sequence[str]) -> dict[str, tuple[int, int]] | None:
    """Return (in, out) of the base model's layers that targets mean; None where they are not known here."""
    base = zoo().get(entry.base)
    if base is None or not targets:
        return None
    each = base.linears()
    if set(targets) == {"all-linear"}:
        return {path: shape for path, shape in each.items() if path != HEAD}
    return {path: shape for path, shape in each.items() if not ends(path).isdisjoint(targets)}


def unlike(targets: set[str], layers: Mapping[str, object]) -> list[str]:
    """Return the targets that mean no layer, and the layers that no target means; each sorted."""
    left, bare = set(targets), []
    for path in layers:
        meant = ends(path) & targets
        left -= meant
        bare += [] if meant else [path]
    return sorted(left) + sorted(bare)


def config_problems(config: AdapterConfig, layers: Layers, entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield what an adapter's settings of any kind say that its file or the run does not."""
    if not config.is_of(entry.base):
        yield CONFIG, f"was made for {config.base!r}, the entry says {entry.base!r}"
    if config.revision not in (None, "", entry.revision):
        yield CONFIG, f"was made for revision {config.revision[:80]!r}, the entry says {entry.revision!r}"
    narrowed = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern")
    # layer 0 alone is written as a number, which is false
    if wrong := [name for name in narrowed if getattr(config, name, None) not in (None, [], {}, "")]:
        yield CONFIG, f"{wrong[0]} is set; a run sets none"
    if config.fan_in_fan_out and zoo().get(entry.base):
        yield CONFIG, "fan_in_fan_out is set; the base model has no such layer"
    if not isinstance(config.target_modules, list):
        yield CONFIG, "target_modules is no list of names; a run writes one"
    elif wrong := unlike(set(config.target_modules), layers):
        yield CONFIG, f"target_modules and the layers in the file are not the same: {wrong[0][:200]}"


def layer_problems(found: Layers, wanted: Layers | None, targets: set[str], key: str) -> Iterator[tuple[str, str]]:
    """Yield layers that are not those of the base model, or of the targets that the setting `key` names."""
    if wanted is not None and found != wanted:
        wrong = min((path for path, _ in found.items() ^ wanted.items()), default="")
        yield WEIGHTS, f"its {len(found)} layers are not the {len(wanted)} that the settings adapt: {wrong[:200]}"
    # a target with dots may mean no layer, as long as its last part is a name of the model
    others = unlike(targets, found) if targets and targets != {"all-linear"} else []
    if wrong := next((name for name in others if name in found), ""):
        yield WEIGHTS, f"{wrong[:200]} is no layer that {key} names"
    elif wrong := next((name for name in others if "." not in name), ""):
        yield WEIGHTS, f"has no layer {wrong[:200]}, which {key} names"
