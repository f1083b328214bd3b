"""The spaces by name: ours, a file and a line here each, and those of other packages. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedtune.config import Config
from fedtune.config.load import flatten
from fedtune.config.schema import LoraSettings
from fedtune.config.section import own_problems
from fedtune.registry import Registry, subclass_of
from fedtune.spaces.base import Space
from fedtune.spaces.full import Full
from fedtune.spaces.ia3 import IA3
from fedtune.spaces.lora import Lora
from fedtune.types import Problem, nearest

_class = subclass_of(Space)
SPACES = Registry[Space](
    "space", {space.name: space for space in (Lora(), IA3(), Full())}, lambda name, found: _class(name, found)()
)

__all__ = ["SPACES", "Space", "of", "of_folder", "problems"]


def of(config: Config) -> Space:
    """Return the space of a run. The settings have passed `problems`."""
    return SPACES[config.peft.kind]


def of_folder(folder: Path) -> Space:
    """Return the space of a folder that a run saved, or anybody: an adapter's, or that of whole models.

    Raises:
        AdapterError, CorruptFileError: it is neither, or not safe to open.
    """
    from fedtune.models.adapter_config import read_config
    from fedtune.models.folder import check_files
    from fedtune.models.source import CONFIG

    if (folder / "config.json").is_file() and not (folder / CONFIG).exists():
        return SPACES[Full.name]
    check_files(folder)
    return SPACES[read_config(folder).kind.lower()]


def problems(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the space: its name, its settings, and settings of LoRA where nothing is a factor."""
    name = config.peft.kind
    if name not in SPACES:
        fix = SPACES.fault(name) or nearest(name, SPACES) or "list them: fedtune ls spaces"
        yield Problem(f'peft.kind = "{name}"', "unknown space", fix)
        return
    space = SPACES[name]
    yield from own_problems("peft", name, space.Parameters, config.peft.parameters)
    yield from space.problems(config)
    if not space.factored:
        usual = flatten(LoraSettings().model_dump(mode="json"))
        own = flatten(config.lora.model_dump(mode="json"))
        for key in (key for key, value in own.items() if value != usual.get(key)):
            yield Problem(f"lora.{key} = {own[key]!r}", f'has no effect with peft.kind = "{name}"', "leave it out")
