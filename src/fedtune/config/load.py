"""Merge protocol, file and command line; report every mistake at once, each with what would repair it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedtune.config.depth import DEEPEST, parsed, too_deep
from fedtune.config.protocol import Protocol, protocol_names, read_protocol
from fedtune.config.schema import Config, ObjectiveSettings
from fedtune.io import canonical, read_text
from fedtune.types import ConfigError, Problem, nearest

Check = Callable[[Config], Iterable[Problem]]
MOST_TOLD = 100  # problems


@dataclass(frozen=True)
class Settings:
    """The validated settings of a run, the protocol they come from, and why it cannot be ranked (empty when it can)."""

    config: Config
    protocol: Protocol
    unranked: tuple[str, ...]


def parse_assignment(text: str) -> dict[str, Any]:
    """Turn `train.max_steps=10` into nested settings; the value is TOML, and a bare word is a string.

    Raises:
        ConfigError: no `=` in it, or a key of too many parts.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError("command line", [Problem(text, "is not key=value", "for example -s train.max_steps=10")])
    parts = key.strip().split(".")
    if len(parts) > DEEPEST:
        raise ConfigError("command line", [Problem(key.strip()[:60], f"has more than {DEEPEST} parts")])
    read: Any = value
    with contextlib.suppress(ValueError):
        read = parsed(f"value = {value}")["value"]
    return nest(parts, read)


def nest(parts: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a value as nested settings, at the place that the parts of its dotted key name."""
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


# tables that are one value: their keys are numbers somebody chose, not settings with a default
WHOLE = frozenset({("lora", "ranks")})


def merge(base: Mapping[str, Any], top: Mapping[str, Any], place: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return `base` with `top` laid over it, both at `place`; table by table, but one of `WHOLE` replaces another."""
    merged = dict(base)
    for key, value in top.items():
        below, here = merged.get(key), (*place, key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and here not in WHOLE:
            value = merge(below, value, here)
        merged[key] = value
    return merged


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Read a settings file.

    Raises:
        ConfigError: not TOML (with line and column), or a key of too many parts.
        CorruptFileError: missing, oversized, or not UTF-8.
    """
    try:
        return parsed(read_text(path, max_bytes=1024**2))
    except ValueError as err:  # also for a number of thousands of digits
        raise ConfigError(str(path), [Problem(str(path), f"is not TOML that can be read: {err}")]) from err


def _section(path: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the settings class at a dotted place, if there is one."""
    model: type[BaseModel] = Config
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def _known_key(path: Sequence[str | int]) -> str:
    """Suggest the key that was meant: the same word in another table, else a near one in this table or anywhere."""
    model = _section(path[:-1])
    keys = flatten(Config(domain="x").plain())
    if same := [k for k in keys if k.rsplit(".", 1)[-1] == str(path[-1])]:
        return f'did you mean "{same[0]}"?'
    here = nearest(str(path[-1]), model.model_fields) if model else ""
    return here or nearest(".".join(map(str, path)), keys)


def _problem(error: Mapping[str, Any]) -> Problem:
    """Turn one pydantic error into a sentence with the key, the value and the remedy."""
    path = error["loc"]
    where = ".".join(map(str, path)) or "settings"
    if error["type"] == "extra_forbidden":
        return Problem(where, "unknown key", _known_key(path))
    if error["type"] == "missing":
        return Problem(where, "is missing", "name a domain: fedtune run finance")
    value = error.get("input")
    shown = f" = {value!r:.200}" if not isinstance(value, (dict, BaseModel)) else ""
    fix = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        fix = nearest(value, str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", "))
    return Problem(where + shown, error["msg"].removeprefix("Value error, "), fix)


def _assemble(layers: Sequence[Mapping[str, Any]]) -> tuple[Protocol, dict[str, Any]]:
    wanted: dict[str, Any] = functools.reduce(merge, layers, {})
    protocol = read_protocol(str(wanted.get("protocol", Config.model_fields["protocol"].default)))
    frozen, peft = merge(protocol.settings, protocol.domains.get(str(wanted.get("domain", "")), {})), wanted.get("peft")
    if isinstance(peft, Mapping) and peft.get("kind", "lora") != "lora":
        frozen.pop("lora", None)  # nobody chose it, and something else is trained
    return protocol, merge(frozen, wanted)


def standard(domain: str, protocol: Protocol) -> Config:
    """Return the settings of a protocol for a domain, where nobody sets anything else."""
    frozen = merge(protocol.settings, protocol.domains.get(domain, {}))
    return Config.model_validate(merge({"domain": domain, "protocol": protocol.name}, frozen))


def changed(config: Config) -> dict[str, Any]:
    """Return the settings, by dotted key, that differ from the protocol's and from the defaults."""
    usual = [Config(domain=config.domain)]
    if config.protocol in protocol_names():
        usual.append(standard(config.domain, read_protocol(config.protocol)))
    known = [flatten(each.plain()) for each in usual]
    # a method's own settings have no value elsewhere: they count where they are set
    new = flatten(config.plain()).items()
    return {key: value for key, value in new if all(key not in k or k[key] != value for k in known)}


def unranked_reasons(config: Config, protocol: Protocol) -> tuple[str, ...]:
    """List why a run with these settings cannot be ranked: its arm, a protocol that is not, or a locked key changed."""
    if config.arm != "federated":
        return (f"the arm {config.arm} is a baseline; only federated runs are ranked",)
    if not protocol.ranked:
        return (f"the protocol {protocol.name} is not ranked",)
    if config.attack.kind != "none":
        return ("scripted attackers take part",)
    if config.peft.kind != "lora":
        return (f"peft.kind is {config.peft.kind!r}, the protocol {protocol.name} trains LoRA",)
    if config.objective != ObjectiveSettings():
        return (f"it trains by the objective {config.objective.name}, and cross-entropy is what is ranked",)
    want = flatten(standard(config.domain, protocol).plain())
    have = flatten(config.plain())
    changed = [k for k in want if protocol.locks(k) and canonical(want[k]) != canonical(have.get(k))]
    return tuple(f"{k} is {have.get(k)!r}, locked at {want[k]!r} by {protocol.name}" for k in changed)


def _without(tree: Mapping[str, Any], places: Sequence[Sequence[str | int]]) -> dict[str, Any]:
    """Return nested settings without the entries at some places."""
    kept = {}
    for key, value in tree.items():
        inside = [p[1:] for p in places if p and p[0] == key]
        if any(len(p) == 0 for p in inside):
            continue
        kept[key] = _without(value, inside) if inside and isinstance(value, Mapping) else value
    return kept


def _found(config: Config, checks: Sequence[Check]) -> list[Problem]:
    """Return the first problems that the checks find: a settings file of a megabyte can make a hundred thousand."""
    return list(islice((p for check in checks for p in check(config)), MOST_TOLD))


def _told(tree: Mapping[str, Any], err: ValidationError, checks: Sequence[Check]) -> list[Problem]:
    """Return the problems of wrong settings; where there are very many, what each was meant to be is not looked for."""
    errors = err.errors()
    found = [_problem(dict(e)) for e in errors[:MOST_TOLD]]
    if len(errors) > MOST_TOLD:
        return [*found, Problem("settings", f"{len(errors) - MOST_TOLD} more are wrong")]
    try:
        left = Config.model_validate(_without(tree, [e["loc"] for e in errors]))
    except ValidationError:
        return found
    return found + _found(left, checks)


def validated(layers: Sequence[Mapping[str, Any]], checks: Sequence[Check], title: str) -> Settings:
    """Validate settings, later layers over earlier ones, by the schema and by further checks.

    `fedtune.settings.load` names the checks, and calls the source `title` in an error.

    Raises:
        ConfigError: with every problem found, or the first `MOST_TOLD` of them.
    """
    if deep := next(filter(None, map(too_deep, layers)), ""):
        raise ConfigError(title, [Problem(deep, f"lies more than {DEEPEST} tables or lists deep")])
    protocol, tree = _assemble(layers)
    try:
        config = Config.model_validate(tree)
    except ValidationError as err:
        raise ConfigError(title, _told(tree, err, checks)) from err
    if problems := _found(config, checks):
        raise ConfigError(title, problems)
    return Settings(config, protocol, unranked_reasons(config, protocol))
