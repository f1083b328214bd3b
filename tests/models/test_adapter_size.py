"""An adapter's settings are small: a file of them that is not is refused before it is parsed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.models.adapter_config import MOST_BYTES, read_config
from fedtune.models.folder import checked
from fedtune.models.source import CONFIG
from fedtune.types import CorruptFileError


def _config(folder: Path) -> None:
    read_config(folder)


def _folder(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")
    checked(folder)


@pytest.mark.parametrize("reader", [_config, _folder])
def test_a_long_file_of_settings_is_not_parsed(tmp_path: Path, reader: Callable[[Path], None]) -> None:
    head = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})[:-1] + ', "runtime_config": ['
    (tmp_path / CONFIG).write_text(head + "[]," * (MOST_BYTES // 3) + "0]}")
    with pytest.raises(CorruptFileError, match=rf"{CONFIG}: 2\d{{6}} bytes, more than the {MOST_BYTES}"):
        reader(tmp_path)


def test_settings_of_every_layer_by_name_are_far_below_the_bound(tmp_path: Path) -> None:
    names = [f"model.language_model.layers.{i}.mlp.experts.{i}.gate_up_proj" for i in range(4096)]
    ranks = dict.fromkeys(names, 8)
    tree = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": names, "rank_pattern": ranks}
    (tmp_path / CONFIG).write_text(json.dumps({**tree, "alpha_pattern": ranks}))
    assert (tmp_path / CONFIG).stat().st_size < MOST_BYTES / 2
    assert read_config(tmp_path).rank_pattern == ranks
