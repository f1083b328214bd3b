"""Settings of a fast run in any space."""

from collections.abc import Callable
from typing import Any

import pytest

from fedtune.config import Settings
from fedtune.config.load import merge
from fedtune.settings import load


@pytest.fixture(scope="session")
def made(settings: Callable[..., Settings]) -> Callable[..., Settings]:
    """Build settings of a fast finance run with `peft.kind`; those of LoRA are left out."""
    base = settings(federation={"clients": 3, "rounds": 2}, eval={"limit": 2}).config.plain()
    base.pop("lora")

    def build(kind: str, **changes: Any) -> Settings:
        return load([merge(base, {"peft": {"kind": kind}, **changes})])

    return build
