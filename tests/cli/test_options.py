"""Options that would change nothing, or that cannot be met, are refused before any work."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click import Context
from typer.main import get_command
from typer.testing import CliRunner

from fedtune.cli import app
from fedtune.types import ConfigError

REFUSED = {
    "tests of no program": (["score", "mmlu_stem", "x.json", "--references", "t.json"], "--references t.json: has no"),
    "strict programs": (
        ["score", "humaneval", "x.json", "--mode", "strict"],
        "--mode strict: humaneval is scored as official",
    ),
    "training of rows": (["data", "finance", "-s", "train.max_steps=3"], "train.max_steps: has no effect on training"),
    "rounds of rows": (["data", "finance", "-s", "federation={rounds=3}"], "federation.rounds: has no effect"),
    "a text as plot": (["data", "finance", "--plot", "x.txt"], "x.txt: is no plot's name; it ends in .svg, .png, .pdf"),
    "no ending": (["data", "finance", "--plot", "plot"], "--plot plot: is no plot's name"),
    "split of items": (
        ["eval", "m", "--domain", "finance", "-s", "data.partition=iid"],
        "data.partition: has no effect",
    ),
    "a curve of one": (["eval", "m", "--domain", "finance", "-s", "eval={every=1}"], "eval.every: has no effect"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_option_without_effect_is_refused(what: str) -> None:
    words, told = REFUSED[what]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError), done.output
    assert told in str(done.exception)


def leaves(group: Any) -> Iterator[Any]:
    context = Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        yield from leaves(found) if hasattr(found, "commands") else [found]


def test_every_argument_and_option_says_what_it_is() -> None:
    found = list(leaves(get_command(app)))
    assert len(found) > 15
    assert [(c.name, p.name) for c in found for p in c.params if not p.help] == []
    for words in (["run"], ["board", "build"]):
        assert "The " in CliRunner().invoke(app, [*words, "--help"]).stdout.partition("Arguments")[2].splitlines()[1]


@pytest.mark.parametrize("ending", ["png", "PDF"])
def test_a_plot_is_drawn_in_the_format_of_its_ending(ending: str, data_folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / f"new/split.{ending}"
    words = ["data", "finance", "--data", str(data_folder), "-s", "federation={clients=3}", "--plot", str(plot)]
    done = CliRunner().invoke(app, words)
    assert done.exception is None, done.output
    assert plot.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"%PDF")
