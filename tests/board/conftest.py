"""Two finished runs of one recipe and the submission they make, once for all tests of the board."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.board.submit import pack
from fedtune.config import Settings
from fedtune.experiment.run import run


@pytest.fixture(scope="session")
def runs(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    short = {
        "federation": {"clients": 2, "rounds": 2},
        "eval": {"base": True, "modes": ["likelihood", "official"], "official_limit": 6},
    }
    return [run(settings(seed=s, **short), root / f"s{s}")[0] for s in (1, 2)]


@pytest.fixture(scope="session")
def good(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "submission"
    pack(runs, out, "a team", "a title", "https://example.org")
    return out
