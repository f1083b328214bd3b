"""Whatever the method, the split or the arm: what an honest run leaves is a good submission."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.board.submit import pack
from fedtune.board.validate import check
from fedtune.config import Settings
from fedtune.experiment.run import run
from fedtune.methods import METHODS

KINDS: dict[str, dict[str, Any]] = {
    **{name: {"method": {"name": name}} for name in METHODS},
    "dora": {"lora": {"dora": True}},
    "rslora": {"lora": {"rslora": True}},
    "centralised": {"arm": "centralised"},
    "ranks of their own": {"method": {"name": "hetlora"}, "lora": {"ranks": [4, 2]}},
    "a share of the clients": {"federation": {"clients": 5, "rounds": 2, "fraction": 0.5}},
    "clients without rows": {"data": {"partition": "dirichlet:0.05"}, "federation": {"clients": 5, "rounds": 2}},
    "all layers": {"lora": {"target_modules": ["all-linear"]}},
    "a rank above the layers'": {"method": {"name": "flora"}, "lora": {"r": 48}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_run_is_good(settings: Callable[..., Settings], tmp_path: Path, kind: str) -> None:
    short = {"federation": {"clients": 2, "rounds": 2}, "train": {"max_steps": 1}, "eval": {"limit": 4}}
    pack([run(settings(seed=1, **{**short, **KINDS[kind]}), tmp_path / "run")[0]], tmp_path / "packed", "a team")
    assert [str(p) for _, _, problems in check(tmp_path / "packed") for p in problems] == []
