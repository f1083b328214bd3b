"""A run folder that somebody else made: whatever its links lead to is neither read, nor packed, nor written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.board.entries import from_run
from fedtune.board.submit import pack
from fedtune.config import Settings
from fedtune.experiment.evaluate import evaluate
from fedtune.experiment.run import run
from fedtune.experiment.verify import verify
from fedtune.types import CorruptFileError


@pytest.fixture(scope="module")
def short(settings: Callable[..., Settings]) -> Settings:
    return settings(federation__rounds=1, federation__clients=2, train__max_steps=1, eval__limit=4)


@pytest.fixture(scope="module")
def finished(short: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(short, tmp_path_factory.mktemp("runs") / "run")[0]


def _link(path: Path, secret: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(secret)


def _fifo(path: Path, secret: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("put", [_link, _fifo])
@pytest.mark.parametrize("name", ["lock", "result.json", "adapter/extra.json", "evals/federated/fpb.likelihood.jsonl"])
def test_no_command_follows_a_link_or_waits_for_a_fifo(
    short: Settings, finished: Path, tmp_path: Path, name: str, put: Callable[[Path, Path], None]
) -> None:
    theirs, secret = Path(shutil.copytree(finished, tmp_path / "theirs")), tmp_path / "credentials.json"
    secret.write_text('{"key": "SECRET"}')
    put(theirs / name, secret)
    ways: dict[str, Callable[[], object]] = {
        "submit": lambda: pack([theirs], tmp_path / "out", "team"),
        "report": lambda: from_run(theirs),
        "verify": lambda: verify(theirs, 1),
        "resume": lambda: run(short, theirs, resume=True),
    }
    if name.startswith("evals"):
        ways["eval --out"] = lambda: evaluate(short.config, None, theirs / "evals/federated")
    for way in ways.values():
        with pytest.raises(CorruptFileError, match=f"{Path(name).name}: is (a link|neither)"):
            way()
    assert secret.read_text() == '{"key": "SECRET"}'
    assert not (tmp_path / "out").exists()
