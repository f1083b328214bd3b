"""What the pages name is there: each test, file, page, command, option and setting."""

from __future__ import annotations

import ast
import fnmatch
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import click
import pytest
import typer

from fedtune.cli import app
from fedtune.config import Config
from fedtune.methods import METHODS
from fedtune.objectives import OBJECTIVES
from fedtune.spaces import SPACES
from tests.outside import FEDEMA

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what there was
COMMAND = re.compile(r"`(?:[A-Z_]+=\S+ )?fedtune ([a-z][^`]*)`")
SETTING = re.compile(r"`(?:-s )?([a-z]+)\.([a-z_0-9*]+)(?=[`= ])")
FILES = {"json", "jsonl", "toml", "py", "md", "safetensors", "gz", "csv", "html"}
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)")


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    for name, function in NAMED_TEST.findall(page.read_text("utf-8")):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"
        assert not function or function in functions(ROOT / name), f"{page.name} names {name}::{function}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text("utf-8")) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_promise_names_the_test_that_holds_it() -> None:
    rows = [line for line in (ROOT / "docs/trust.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| promise", "| -"))]
    assert promises
    assert not [row for row in promises if not NAMED_TEST.search(row)]


@pytest.mark.parametrize("page", CURRENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_and_option_that_a_page_names_exists(page: Path) -> None:
    for text in COMMAND.findall(page.read_text("utf-8")):
        command: click.Command = typer.main.get_command(app)
        words = shlex.split(text.replace("\n", " "))
        while words and isinstance(command, click.Group):
            assert words[0] in command.commands, f"{page.name}: fedtune {text}"
            command = command.commands[words.pop(0)]
        known = {name for parameter in command.params for name in (*parameter.opts, "--help")}
        assert {w.split("=")[0] for w in words if w.startswith("-")} <= known, f"{page.name}: fedtune {text}"


def settings_of(section: str) -> set[str]:
    """The keys of a section, with those of the components that it names."""
    own = set(getattr(Config.model_fields[section].annotation, "model_fields", ()))
    named = {"method": METHODS, "objective": OBJECTIVES, "peft": SPACES}.get(section, {})
    return own | {name for component in named.values() for name in component.Parameters.model_fields}


@pytest.mark.parametrize("page", CURRENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    for section, key in SETTING.findall(page.read_text("utf-8")):
        if section in Config.model_fields and key not in FILES and section not in ("arm", "seed", "domain"):
            assert fnmatch.filter(settings_of(section), key), f"{page.name} names {section}.{key}"


def test_the_layers_of_the_page_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    shown = page.split("## Layers")[1].split("```")[1].strip().splitlines()
    assert [re.split(r"\s{2,}", line)[0] for line in shown] == [
        name.replace("fedtune.", "") for name in contracts[0]["layers"]
    ]


def test_the_package_of_the_page_is_the_one_that_is_tested() -> None:
    page = (ROOT / "docs/add-a-method.md").read_text("utf-8").split("## In a package of your own")[1]
    toml, code = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("toml", "python"))
    assert code.strip() == textwrap.dedent(FEDEMA).strip()
    assert tomllib.loads(toml)["project"]["entry-points"] == {"fedtune.methods": {"fedema": "fedtune_ema:FedEMA"}}
