"""The page on adding a runtime: its grid runs the same rounds as the one in this process."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config import Settings
from fedtune.federation import messages
from fedtune.federation.rounds import run_rounds
from fedtune.io import read_lines
from fedtune.lora.state import to_tensors
from fedtune.methods import ServerState
from tests.faults.test_bad_updates import federation, start, toy_app

PAGE = Path(__file__).parents[2] / "docs/add-a-runtime.md"


def app(*, fails: bool) -> ClientApp:
    """Return clients that say who they are; one may fail."""
    made = toy_app((lambda *_: 1 / 0) if fails else None)

    @made.query()
    def query(message: Message, context: Context) -> Message:
        known = {"client": int(context.node_config["partition-id"]), "examples": 50}
        return Message(RecordDict({messages.IDENTITY: ConfigRecord(known)}), reply_to=message)

    return made


@pytest.mark.parametrize("fails", [False, True])
def test_the_runtime_of_the_page_gives_the_same_rounds(
    settings: Callable[..., Settings], tmp_path: Path, fails: bool
) -> None:
    scope: dict[str, Any] = {"__name__": "page"}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)[0], scope)
    config = settings(federation={"clients": 4, "rounds": 2}).config
    near = run_rounds(federation(config, tmp_path / "near", app(fails=fails)), ServerState(start()))
    grid = scope["Threads"](app(fails=fails), 4)
    assert type(grid).__mro__[1].__module__.startswith("flwr")
    far = run_rounds(federation(config, tmp_path / "far", app(fails=fails), grid=grid), ServerState(start()))
    want, got = to_tensors(near.state.adapter), to_tensors(far.state.adapter)
    assert all(torch.equal(want[n], got[n]) for n in want)
    one, two = (read_lines(tmp_path / where / "rounds.jsonl") for where in ("near", "far"))
    assert [[c["client"] for c in r["clients"]] for r in two] == [[c["client"] for c in r["clients"]] for r in one]
    assert [len(r["rejected"]) for r in two] == [int(fails)] * 2
