"""Damaged settings end in settings or in a `FedtuneError`, whatever the damage is."""

from pathlib import Path

import pytest
import tomli_w

from fedtune.config.load import parse_assignment, read_toml
from fedtune.settings import load
from fedtune.types import ConfigError, FedtuneError
from tests.faults.mutate import DEEP, damaged


def _read(path: Path) -> bool:
    try:
        load([read_toml(path)])
    except FedtuneError:
        return False
    return True


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_settings_are_read_or_refused(count: int, tmp_path: Path) -> None:
    whole = tomli_w.dumps(load([{"domain": "finance"}]).config.plain()).encode()
    read = 0
    for seed in range(count):
        _, data = damaged(whole, seed)
        (tmp_path / "run.toml").write_bytes(data)
        read += _read(tmp_path / "run.toml")
    assert 0 < read < count, "some damage is harmless, and some is not"


@pytest.mark.parametrize(
    "value", [DEEP, "9" * 5000, "0x" + "f" * 5000, "0b1" + "0" * 63, "[0, {a = -0o7" + "0" * 40 + "}]"]
)
def test_values_that_the_parser_gives_up_on_are_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f"seed = {value}\n")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="seed"):
        load([{"domain": "finance"}, parse_assignment(f"seed={value}")])
