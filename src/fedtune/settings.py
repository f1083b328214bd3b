"""Settings that are valid as a whole: names, combinations, and no setting without effect. No torch here."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedtune import domains, methods, objectives, spaces
from fedtune.config import Config, Settings
from fedtune.config.load import changed, merge, nest, read_toml, validated
from fedtune.domains.base import Task
from fedtune.evaluation import scorers
from fedtune.machine import expanded
from fedtune.methods.wrappers import WRAPPERS
from fedtune.models import zoo
from fedtune.registry import Origin
from fedtune.types import ConfigError, Problem

Found = Iterator[tuple[str, str]]


# what only a federation takes notice of: the other arms train plain LoRA, with one model and nobody to wait for
OF_A_FEDERATION = (
    *("method", "drift", "server", "robust", "attack", "wrappers", "lora.ranks"),
    *(f"federation.{key}" for key in ("faults", "deadline", "connect_timeout", "min_clients", "weights")),
)


def load(
    layers: Sequence[Mapping[str, Any]],
    title: str = "settings",
    *,
    here: bool = True,
    kept: bool = False,
    beside: Sequence[str] = (),
) -> Settings:
    """Validate settings, later layers over earlier ones, over the protocol they name.

    Args:
        layers: nested tables: a file's content, then the command line's.
        title: what to call the source in an error.
        here: also look for the folders they name; settings of another machine's run name folders of that machine.
        kept: they are read back from a run that was made: a setting without effect was refused then, and where a
            default has changed since, the file has the old one. Settings of another machine's run are such.
        beside: arms that are trained beside the settings' own, and take notice of settings that it does not.

    Raises:
        ConfigError: with every problem found.
    """
    checks = OF_A_RUN if kept or not here else (*CHECKS, partial(without_effect_on_arms, beside=beside))
    found = validated(layers, (*checks, *(PLACES if here else ())), title)
    foreign = (f"the {what} comes from the package {origin}" for what, origin in outside(found.config).items())
    return replace(found, unranked=(*found.unranked, *foreign))


# the short forms of the command line and of keywords
SHORT = {
    "model": "model.name",
    "method": "method.name",
    "rounds": "federation.rounds",
    "clients": "federation.clients",
    "partition": "data.partition",
}


def nested(**named: Any) -> dict[str, Any]:
    """Turn keywords into nested settings: sections, dotted keys, or short forms (`rounds=3`); None means not given."""
    found: dict[str, Any] = {}
    for name, value in named.items():
        key = name if isinstance(value, Mapping) else SHORT.get(name, name)
        if value is not None:
            found = merge(found, nest(key.split("."), str(value) if isinstance(value, Path) else value))
    return found


def _of_folder(folder: Path | None) -> dict[str, Any]:
    """Return the settings of a data folder."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError("settings", [Problem(f"--data {folder}", "no such folder", "it holds train/ and eval/")])
    return {"data": {"source": "folder", "path": str(folder.resolve()), "limit": 0, "balance": False}}


def _absolute(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings with the folders they name written out: a run is continued from anywhere."""
    for section, key in (("data", "path"), ("model", "name")):
        table = layer.get(section)
        name = table.get(key) if isinstance(table, Mapping) else None
        if isinstance(name, str) and name and zoo.is_local(name):
            layer = merge(layer, {section: {key: str(expanded(name).resolve())}})
    return layer


def resolve(
    file: Path | None,
    layers: Sequence[Mapping[str, Any]],
    folder: Path | None = None,
    *,
    kept: bool = False,
    beside: Sequence[str] = (),
) -> Settings:
    """Validate a file's settings, a data folder's, and further layers, later over earlier.

    `kept` and `beside` are those of `load`: a file in the folder of a run may have defaults of then.

    Raises:
        ConfigError: with every problem found.
    """
    every = [*([read_toml(file)] if file else []), _of_folder(folder), *layers]
    return load([_absolute(layer) for layer in every], str(file or "settings"), kept=kept, beside=beside)


def outside(config: Config) -> dict[str, Origin]:
    """Return the components of other packages that a run uses, such as `method fedema`, and where each comes from."""
    used: tuple[tuple[str, Callable[[str], Origin | None], Sequence[str]], ...] = (
        ("method", methods.METHODS.origin, [config.method.name]),
        ("wrapper", WRAPPERS.origin, [*config.wrappers]),
        ("space", spaces.SPACES.origin, [config.peft.kind]),
        ("objective", objectives.OBJECTIVES.origin, [config.objective.name]),
        ("domain", domains.DOMAINS.origin, [config.domain]),
        ("task", domains.TASKS.origin, config.eval.tasks),
        ("kind", scorers.KINDS.origin, sorted({task.kind for task in domains.chosen_tasks(config)})),
    )
    found = {f"{kind} {name}": origin(name) for kind, origin, names in used for name in names}
    return {what: origin for what, origin in found.items() if origin is not None}


def without_effect(config: Config) -> Iterable[Problem]:
    """Yield a problem for each setting that is neither the protocol's nor the default, and changes nothing."""
    if config.domain not in domains.DOMAINS or any(name not in domains.TASKS for name in config.eval.tasks):
        return
    own = changed(config)
    for key, why in _reasons(config):
        if key in own:
            yield Problem(f"{key} = {own[key]!r}", f"has no effect: {why}", "leave it out")


def without_effect_on_arms(config: Config, beside: Sequence[str]) -> Iterable[Problem]:
    """Yield a problem for each setting of a federation, or of a split, where none of the arms has one."""
    arms = {config.arm, *beside}
    own = changed(config) if "federated" not in arms else {}
    for key, value in own.items():
        if why := _not_in(arms, key):
            fix = "leave it out, or choose arm = federated"
            yield Problem(f"{key} = {value!r}", f'has no effect: with arm = "{config.arm}" {why}', fix)


def within(key: str, places: Iterable[str]) -> bool:
    """Tell whether a dotted key is one of some sections and keys, or inside one."""
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _not_in(arms: Collection[str], key: str) -> str:
    """Return why no arm but the federated one takes notice of a setting; nothing where one does."""
    if within(key, OF_A_FEDERATION):
        return "plain LoRA is trained without a federation"
    if key == "eval.every":
        return "a run is evaluated at its end only"
    if key == "data.partition" and "local-only" not in arms:
        return "all rows are in one place"
    return ""


def _reasons(config: Config) -> Found:
    name, data = config.model.name, config.data
    if name.startswith("packaged/") or zoo.is_local(name):
        yield "model.revision", "only a model of the Hub has revisions"
    if config.lora.rslora and max(config.lora.ranks or (config.lora.r,)) == 1:
        yield "lora.rslora", "at rank 1 both scales are the same"
    if data.source != "folder" and data.path:
        yield "data.path", f'data.source = "{data.source}" reads no folder'
    if data.balance and not data.limit:
        yield "data.balance", "it chooses which rows stay, and without data.limit all do"
    if config.federation.clients == 1:
        yield "data.partition", "one client has all rows"
        yield "federation.fraction", "the only client is asked in every round"
    yield from _of_evaluation(config, domains.chosen_tasks(config))


# settings of `eval` that not every scorer uses: the value that asks for nothing, and why others may have no effect
SOMETIMES_USED = {
    "official_limit": (0, "nothing is evaluated in official mode"),
    "prompt": (None, "it is for likelihoods, and none are asked for"),
    "samples": (1, "only programs in official mode are sampled, and there are none"),
    "max_new_tokens": (None, "only programs in greedy mode (likelihood) are cut by it, and there are none"),
}


def _of_evaluation(config: Config, tasks: Sequence[Task]) -> Found:
    own = config.eval
    used = {name for task in tasks for scorer in scorers.planned(task, own) for name in scorer.uses}
    for name, (nothing, why) in SOMETIMES_USED.items():
        if name not in used and getattr(own, name) != nothing:
            yield f"eval.{name}", why
    if own.limit and own.official_limit >= own.limit and "official_limit" in used:
        yield "eval.official_limit", f"eval.limit takes {own.limit} items already"
    if own.every >= config.federation.rounds:
        yield "eval.every", f"after the last round ({config.federation.rounds}) a run is evaluated anyway"


def empty(config: Config) -> Iterable[Problem]:
    """Yield what would let a run end without any score."""
    if not config.eval.modes:
        yield Problem("eval.modes", "is empty", 'name ["likelihood"], ["official"] or both')
    elif config.domain in domains.DOMAINS and all(name in domains.TASKS for name in config.eval.tasks):
        tasks = domains.chosen_tasks(config)
        if not any([*scorers.planned(task, config.eval)] for task in tasks):
            names, able = ", ".join(t.name for t in tasks), sorted({mode for t in tasks for mode in scorers.of(t)})
            said = f"{names} cannot be scored in the mode {', '.join(config.eval.modes)}"
            yield Problem("eval.modes", said, f"name {json.dumps(able)}")


def twice(config: Config) -> Iterable[Problem]:
    """Yield what is named more than once in a list."""
    lists: dict[str, Sequence[Any]] = {
        "eval.tasks": config.eval.tasks,
        "eval.modes": config.eval.modes,
        "lora.target_modules": config.lora.target_modules,
        "attack.clients": config.attack.clients,
    }
    for key, names in lists.items():
        for name, count in Counter(names).items():
            if count > 1:
                yield Problem(key, f"names {name!r} twice", "once is enough")


def places(config: Config) -> Iterable[Problem]:
    """Yield folders that are named and not here, or in a way that no settings file can hold."""
    for key, name in (("data.path", config.data.path), ("model.name", config.model.name)):
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            yield Problem(key, f"{name!a} is not UTF-8", "rename the folder")
    if config.data.source == "folder" and not config.data.path:
        yield Problem("data.path", "is empty", "name the folder: --data FOLDER")
    yield from zoo.problems(config)


def installed(config: Config) -> Iterable[Problem]:
    """Yield what the settings need that is not installed here."""
    if config.engine.executor == "ray" and importlib.util.find_spec("ray") is None:
        yield Problem('engine.executor = "ray"', "Ray is not installed", "pip install 'fedtune[simulation]'")


# none of these asks what today's defaults are
OF_A_RUN = (domains.problems, spaces.problems, methods.invalid, objectives.problems, empty, twice)
CHECKS = (domains.problems, spaces.problems, methods.problems, objectives.problems, without_effect, empty, twice)
PLACES = (places, installed)
