"""From command-line options to validated settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune import settings
from fedtune.config import Settings, parse_assignment
from fedtune.config.load import flatten, merge, read_toml
from fedtune.io import expanded
from fedtune.models import zoo
from fedtune.types import ConfigError, Problem


def options(**named: Any) -> dict[str, Any]:
    """Turn the shortcuts of the command line (`--rounds 3`) into settings; None means not given."""
    places = {
        "domain": "domain",
        "protocol": "protocol",
        "arm": "arm",
        "model": "model.name",
        "method": "method.name",
        "rounds": "federation.rounds",
        "clients": "federation.clients",
        "partition": "data.partition",
        "seed": "seed",
    }
    nested: dict[str, Any] = {}
    for name, value in named.items():
        if value is None:
            continue
        layer: Any = value
        for part in reversed(places[name].split(".")):
            layer = {part: layer}
        nested = merge(nested, layer)
    return nested


def taken(assignments: Sequence[str], places: Sequence[str], what: str, but: Sequence[str] = ()) -> Sequence[str]:
    """Return `--set` settings, all of which a command takes notice of.

    Args:
        assignments: as given.
        places: sections and keys that have an effect.
        what: what it is that they have an effect on.
        but: keys of these sections that have none.

    Raises:
        ConfigError: with each that has none.
    """
    keys = [key for text in assignments for key in flatten(parse_assignment(text))]
    wrong = [key for key in keys if not _within(key, places) or _within(key, but)]
    if wrong:
        fix = f"these have: {', '.join(places)}"
        raise ConfigError("command line", [Problem(f"--set {k}", f"has no effect on {what}", fix) for k in wrong])
    return assignments


def _within(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def with_folder(folder: Path | None) -> dict[str, Any]:
    """Return the settings of `--data FOLDER`."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError("command line", [Problem(f"--data {folder}", "no such folder", "it holds train/ and eval/")])
    return {"data": {"source": "folder", "path": str(folder.resolve()), "limit": 0, "balance": False}}


def _absolute(layer: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the folders they name written out: a run is continued from anywhere."""
    for section, key in (("data", "path"), ("model", "name")):
        table = layer.get(section)
        name = table.get(key) if isinstance(table, dict) else None
        if isinstance(name, str) and name and zoo.is_local(name):
            layer = merge(layer, {section: {key: str(expanded(name).resolve())}})
    return layer


def resolve(
    file: Path | None,
    chosen: dict[str, Any],
    assignments: Sequence[str],
    folder: Path | None = None,
    *,
    kept: bool = False,
    beside: Sequence[str] = (),
) -> Settings:
    """Validate file, shortcuts and `-s key=value`, later over earlier, for an arm and those `beside` it.

    A file that is `kept` in the folder of a run may have defaults of then.

    Raises:
        ConfigError: with every problem found.
    """
    layers = [read_toml(file)] if file else []
    layers += [with_folder(folder), chosen]
    for text in assignments:
        layers.append(parse_assignment(text))
    title = str(file) if file else "settings"
    return settings.load([_absolute(layer) for layer in layers], title, kept=kept, beside=beside)
