"""Text that clients, files and models chose goes to records and terminals as it stands, and can do nothing there."""

import io
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from fedtune.cli.say import PlainFormatter, say
from fedtune.experiment.progress import PlainConsole, TerminalReporter
from fedtune.types import Rejection, RoundRecord, last_line, plain

HOSTILE = [
    "FileNotFoundError: no shard in [/data/clients/3]",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:117] out of memory",
    "[bold red]gone[/] :boom:",
    "\x1b[2J\x1b]0;owned\x07 cleared",
    "\x9b31m eight bit",
    "safe \u202e txt.exe",
    "half an emoji \ud83d",
    "two\u2028lines\u0085three",
    "\r overwrites",
    "",
    " \n\t\n",
    "\x00",
    "x" * 1_000_000,
]


def shown(detail: str, terminal: bool) -> str:
    out = io.StringIO()
    watch = TerminalReporter(Console(file=out, force_terminal=terminal, width=400, color_system=None))
    watch.training("federated", 1, 0)
    watch.round(RoundRecord(1, "ok", 0.1, (0,), (), (Rejection(0, "error", detail),), 0, 0))
    watch.note(detail)
    watch.evaluating(detail[:100], 1, 2)
    watch.close()
    return out.getvalue()


@pytest.mark.parametrize("detail", HOSTILE, ids=range(len(HOSTILE)))
def test_an_error_text_is_shown_as_it_stands_and_does_nothing(detail: str) -> None:
    text = shown(detail, terminal=False)
    assert "client 0 not used: error: " in text
    assert not set(text) & set("\x1b\x9b\x07\x00\r\u202e\u2028\ud83d")
    assert len(text) < 10_000
    if detail.strip() and len(detail) < 300 and detail.isprintable():
        assert text.count(detail) == 2
    assert "\x1b[2J" not in shown(detail, terminal=True)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=60), st.integers(8, 40))
def test_plain_text_is_printable_short_and_json(text: str, most: int) -> None:
    safe = plain(text, most)
    assert all(c.isprintable() or c in "\n\t" for c in safe)
    assert len(safe) <= 10 * (most + 50)
    assert json.loads(json.dumps(safe).encode()) == safe
    assert plain(safe, 10_000) == safe
    assert last_line(text)
    assert "\n" not in last_line(text)
    if text.isprintable() and len(text) <= most:
        assert safe == text


def test_a_long_traceback_keeps_its_beginning_and_its_end() -> None:
    text = plain("Traceback" + "x" * 10_000 + "OutOfMemoryError", 100)
    assert text.startswith("Traceback")
    assert text.endswith("OutOfMemoryError")
    assert "9925 characters left out" in text
    assert last_line("Traceback\n  File\nOutOfMemoryError: 2 GiB\n\n") == "OutOfMemoryError: 2 GiB"


def test_tables_show_names_from_outside_as_they_stand() -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=80)
    table = Table("[b]key", "rows", title="[/none]")
    table.add_row("[/etc] \x1b[31m :boom:", "3")
    console.print(table)
    console.print("to [/data]", soft_wrap=True)
    for name in ("[b]key", "[/none]", "[/etc] \\x1b[31m :boom:", "to [/data]"):
        assert name in out.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_lines_and_logs_steer_no_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    record = logging.LogRecord("fedtune", logging.WARNING, "", 0, "left out: %s", (text,), None)
    shown = capsys.readouterr().out + PlainFormatter().format(record)
    assert not [c for c in shown if not c.isprintable() and c not in "\n\t"]


def test_no_command_prints_a_line_past_that() -> None:
    """What a command prints by itself is JSON, which escapes, or the program's own words and numbers."""
    own = {"__version__", "json.dumps", "tomli_w.dumps", "name:16", "task}", "resolved.", "outbound", "NOTES", "valid"}
    own |= {"of the 3 seeds", "gain: second", "'round'", "bootstrap"}
    printed = [
        line.strip()
        for path in Path("src/fedtune/cli").glob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if "typer.echo(" in line and path.name not in ("say.py", "errors.py")
    ]
    assert not [line for line in printed if not any(word in line for word in own)]
