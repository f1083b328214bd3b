"""`fedtune eval` on adapter folders that anybody made, as a user calls it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli import app
from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.models.adapter import attach, save
from fedtune.models.load import load
from fedtune.types import AdapterError

CONFIG = "adapter_config.json"


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    adapted = attach(load(ModelSettings(name=str(tiny_folder))), LoraSettings(r=2), 0)
    save(adapted, adapted.state(), tmp_path / "adapter")
    return tmp_path / "adapter"


def _eval(target: Path, data: Path, out: Path, *options: str) -> tuple[str, BaseException | None]:
    arguments = ["--domain", "finance", "--data", str(data), "--task", "fpb", "--mode", "likelihood", "--limit", "3"]
    done = CliRunner().invoke(app, ["eval", str(target), *arguments, "--out", str(out), *options])
    return done.output, done.exception


def _name(adapter: Path, base: str) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base}))


def test_a_base_given_by_hand_counts_as_insisting(
    adapter: Path, tiny_folder: Path, data_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _name(adapter, "unsloth/tiny-bnb-4bit")
    output, error = _eval(adapter, data_folder, tmp_path / "out", "--base", str(tiny_folder))
    assert error is None
    assert "fpb" in output
    assert "was trained on 'unsloth/tiny-bnb-4bit'" in caplog.text


def test_what_is_wrong_with_an_adapter_is_said_before_its_base_is_looked_for(
    adapter: Path, data_folder: Path, tmp_path: Path
) -> None:
    _name(adapter, "nobody/nothing")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    _, error = _eval(adapter, data_folder, tmp_path / "out")
    assert isinstance(error, AdapterError)
    assert "init_lora_weights = 'pissa'" in str(error)
    assert not (tmp_path / "out").exists()


def test_a_base_without_an_adapter_and_an_adapter_without_a_base_are_named(
    adapter: Path, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    _, error = _eval(tiny_folder, data_folder, tmp_path / "out", "--base", str(tiny_folder))
    assert "is no adapter folder" in str(error)
    _name(adapter, "")
    _, error = _eval(adapter, data_folder, tmp_path / "out")
    assert "give one with --base" in str(error)
