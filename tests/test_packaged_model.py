"""The packaged real model on the packaged real data: it learns, in one short run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.data import packages
from fedtune.experiment.run import run
from fedtune.io import read_lines
from fedtune.results.stats import compare
from fedtune.settings import load


@pytest.mark.packaged
def test_two_federated_rounds_teach_the_packaged_model_something(packaged: Callable[..., Path], tmp_path: Path) -> None:
    for package in (packages.SMOLLM2, packages.VADER):
        packaged(package)
    small = {
        "domain": "finance",
        "federation": {"clients": 2, "rounds": 2},
        "train": {"max_steps": 4, "per_device_train_batch_size": 8},
        "eval": {"limit": 40, "modes": ["likelihood"]},
    }
    path, result = run(load([small]), tmp_path / "run")
    losses = [line["loss"] for line in read_lines(path / "rounds.jsonl")]
    assert losses[1] < 0.6 * losses[0]
    assert result.bytes_down + result.bytes_up == result.bytes_predicted == 2 * 2 * 2 * 3_701_760
    logs = [read_lines(path / f"evals/{arm}/nyt-econ-sentiment.likelihood.jsonl")[1:] for arm in ("base", "federated")]
    values = [[row["scores"][row["answers"].index(row["gold"])] for row in rows] for rows in logs]
    assert compare(*values).interval.low > 0.5  # nats a token: the right word became much likelier
