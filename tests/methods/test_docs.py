"""Every method has its page, and the page knows its paper and its settings."""

from pathlib import Path

import pytest

from fedtune.methods import METHODS

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
