"""The page about spaces: its example runs as it stands, and its table names what there is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Settings
from fedtune.experiment.run import run
from fedtune.spaces import SPACES
from tests.experiment.test_methods_run import _end

PAGE = (Path(__file__).parents[2] / "docs/add-a-space.md").read_text("utf-8")
[EXAMPLE] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def test_the_example_is_a_space_that_runs(
    made: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}
    exec(EXAMPLE, found)
    monkeypatch.setitem(SPACES.own, "norms", found["Norms"]())
    path, result = run(made("norms", federation={"rounds": 1}), tmp_path / "run")
    assert (result.rounds, result.lost_clients) == (1, 0)
    assert result.bytes_down + result.bytes_up == result.bytes_predicted
    assert len(_end(path)) == 5  # two norms in each of two layers, and the last one
    assert (path / "model/model.safetensors").is_file()


def test_the_table_names_every_space() -> None:
    assert set(re.findall(r"^\| `(\w+)`", PAGE, flags=re.M)) >= set(SPACES)
