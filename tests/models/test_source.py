"""A folder's hash changes with everything that changes what a model says, and with nothing else."""

import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fedtune.models.source import adapter_revision, model_revision, not_a_number


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "tokenizer.model.v3",
        "additional_chat_templates/tools.jinja",
        "model.safetensors.index.json",
        "model.safetensors",
    ],
)
def test_every_file_that_is_read_is_part_of_what_a_model_is(copy: Path, name: str) -> None:
    before = model_revision(copy)
    (copy / name).parent.mkdir(exist_ok=True)
    with open(copy / name, "ab") as file:
        file.write(b" ")
    assert model_revision(copy) != before


def test_what_is_no_file_is_not_read(copy: Path, tiny_folder: Path) -> None:
    """A FIFO would be waited for without end."""
    (copy / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tools.jinja", "vocab.txt"):
        os.mkfifo(copy / name)
    (copy / "additional_chat_templates/zero.jinja").symlink_to("/dev/zero")
    assert model_revision(copy) == model_revision(tiny_folder)


def test_a_readme_a_hidden_file_and_a_folder_beside_it_are_not(copy: Path, tiny_folder: Path) -> None:
    for name in ("README.md", ".gitattributes", "pytorch_model.bin", "modeling.py", "runs/config.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("about")
    assert model_revision(copy) == model_revision(tiny_folder)


def test_an_adapter_is_its_weights_and_its_settings(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    (tmp_path / "README.md").write_text("about")
    one = adapter_revision(tmp_path)
    (tmp_path / "README.md").write_text("more about")
    assert adapter_revision(tmp_path) == one
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    assert adapter_revision(tmp_path) != one


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_none_are_found_in_a_file_whatever_their_width(tmp_path: Path, kind: torch.dtype) -> None:
    path = tmp_path / "file.safetensors"
    limits = torch.finfo(kind)
    fine = {"a": torch.tensor([limits.max, limits.min, limits.tiny, -0.0], dtype=kind), "b": torch.zeros(0, dtype=kind)}
    safetensors.torch.save_file({**fine, "c": torch.tensor([255], dtype=torch.uint8)}, path)
    assert not_a_number(path) == ""
    for value in ("nan", "inf", "-inf"):
        spoilt = torch.zeros(3, 5, dtype=kind)
        spoilt[2, 4] = float(value)
        safetensors.torch.save_file({**fine, "odd": torch.zeros(1, dtype=torch.uint8), "z": spoilt}, path)
        assert not_a_number(path) == "z"
