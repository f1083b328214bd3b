"""Protocols: frozen settings with a name and a hash, and the keys a ranked run must not change."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fedtune.io import digest
from fedtune.types import ConfigError, Problem, nearest


@dataclass(frozen=True)
class Protocol:
    """One protocol file: settings for every domain, those of single domains on top, and the content's sha256.

    A ranked run keeps what is `locked`: dotted keys, or prefixes ending in `.*`. No run can stand on a board at all
    whose protocol is not `ranked`.
    """

    name: str
    title: str
    ranked: bool
    locked: tuple[str, ...]
    settings: dict[str, Any]
    domains: dict[str, dict[str, Any]]
    hash: str

    def locks(self, key: str) -> bool:
        """Tell whether a dotted key is locked."""
        return any(key == k or (k.endswith(".*") and key.startswith(k[:-1])) for k in self.locked)


def protocol_names() -> list[str]:
    """Return the names of the protocols that come with the package."""
    files = resources.files("fedtune.protocols").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def read_protocol(name: str) -> Protocol:
    """Read a protocol by name. Raises ConfigError: unknown name, with the nearest one."""
    if name not in protocol_names():
        fix = nearest(name, protocol_names()) or f"one of {', '.join(protocol_names())}"
        raise ConfigError("settings", [Problem(f'protocol = "{name}"', "unknown protocol", fix)])
    raw = tomllib.loads((resources.files("fedtune.protocols") / f"{name}.toml").read_text(encoding="utf-8"))
    head = raw["protocol"]
    return Protocol(
        name=name,
        title=head["title"],
        ranked=head["ranked"],
        locked=tuple(head["locked"]),
        settings=raw.get("settings", {}),
        domains=raw.get("domains", {}),
        hash=digest(raw),
    )
