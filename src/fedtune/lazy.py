"""The one door to torch for modules that have to load without it: torch is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class _Lazy:
    """Stands for a module until an attribute of it is asked for; each is looked up once."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, found)
        return found


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Lazy("torch")
