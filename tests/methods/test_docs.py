"""Every method has its page, and the page knows its paper and its settings."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Settings
from fedtune.federation.rounds import run_rounds
from fedtune.lora.state import to_tensors
from fedtune.methods import METHODS, ServerState, create
from tests.faults.hostile import clients
from tests.faults.test_bad_updates import federation, start

DOCS = Path(__file__).parents[2] / "docs/methods"


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_has_a_page(name: str) -> None:
    page, index = (DOCS / f"{name}.md").read_text(), (DOCS / "README.md").read_text()
    assert METHODS[name].paper.removeprefix("arXiv:") in page
    assert f"[{name}]({name}.md)" in index
    for part in ("## Pitfalls", "## Tested"):
        assert part in page
    for setting in METHODS[name].Parameters.model_fields:
        assert f"`{setting}" in page or f"method.{setting}" in index or f"`{setting} =" in page, setting


def test_no_page_without_a_method() -> None:
    assert {p.stem for p in DOCS.glob("*.md")} - {"README"} == set(METHODS)


def test_the_method_of_the_page_is_fedsa_lora(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS.parent / "add-a-method.md").read_text()
    scope: dict[str, Any] = {"__name__": "page"}
    exec(re.findall(r"<!-- run by: .*?fedsa_lora -->\n```python\n(.*?)```", page, flags=re.S)[0], scope)
    monkeypatch.setitem(METHODS.own, "keeps_b", scope["KeepsB"])
    found = []
    for name in ("keeps_b", "fedsa_lora"):
        config = settings(federation={"clients": 3, "rounds": 3}, method__name=name).config
        app = clients(create(config), start(), bad=-1, mutate=lambda reply: reply)
        done = run_rounds(federation(config, tmp_path / name, app), ServerState(start()))
        assert not [r for record in done.records for r in record.rejected]
        found.append(to_tensors(done.state.adapter))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[1])
    assert any(not torch.equal(found[1][n], t) for n, t in to_tensors(start()).items())
