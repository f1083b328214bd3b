"""An evaluation by itself: one at a time in a folder, and done again when anything it depends on has changed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Config, Settings
from fedtune.experiment.evaluate import evaluate, identity
from fedtune.io import folder_lock, read_json, read_lines, write_json
from fedtune.models.adapter import attach, save
from fedtune.models.load import load
from fedtune.types import LockedError


@pytest.fixture(scope="module")
def few(settings: Callable[..., Settings], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    model = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("own") / "model")
    return settings(model={"name": str(model)}, eval={"limit": 6, "prompt": "chat"}).config


@pytest.fixture(scope="module")
def adapter(few: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapted = attach(load(few.model), few.lora, 1)
    state = {path: replace(module, b=torch.ones_like(module.b)) for path, module in adapted.state().items()}
    folder = tmp_path_factory.mktemp("adapter")
    save(adapted, state, folder)
    return folder


def samples(few: Config, adapter: Path, folder: Path) -> list[Any]:
    evaluate(few, adapter, folder)
    return [row["scores"] for row in read_lines(folder / "fpb.likelihood.jsonl")[1:]]


def _alpha(few: Config, adapter: Path) -> None:
    settings = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", {**settings, "lora_alpha": settings["lora_alpha"] * 8})


def _template(few: Config, adapter: Path) -> None:
    folder = Path(few.model.name)
    for path in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        if path.exists() and "<|im_start|>assistant" in path.read_text():
            path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>oracle"))


@pytest.mark.parametrize("change", [_alpha, _template])
def test_an_evaluation_is_made_anew_when_what_it_depends_on_has_changed(
    few: Config, adapter: Path, tmp_path: Path, change: Callable[[Config, Path], None]
) -> None:
    before = samples(few, adapter, tmp_path / "out")
    assert samples(few, adapter, tmp_path / "out") == before
    change(few, adapter)
    after = samples(few, adapter, tmp_path / "out")
    assert after != before
    assert after == samples(few, adapter, tmp_path / "fresh")


def test_precision_and_quantisation_are_part_of_what_is_evaluated(few: Config) -> None:
    base = load(few.model)
    half = few.model_copy(update={"model": few.model.model_copy(update={"quantization": 4})})
    known = {json.dumps(identity(base, c)) for c in (few, half)}
    base.model.to(torch.bfloat16)
    known.add(json.dumps(identity(base, few)))
    assert len(known) == 3


def test_one_evaluation_at_a_time_in_a_folder(few: Config, adapter: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(LockedError, match=r"in use by pid \d+ on .*choose another --out"):
        evaluate(few, adapter, tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))
