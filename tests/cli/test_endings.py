"""However a command ends, it ends with a message that says what to do, an exit code, and no traceback."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer

from fedtune import cli
from fedtune.cli import errors
from fedtune.config import Settings
from fedtune.machine import cache_dir, expanded
from fedtune.types import CancelledError, DataError, FedtuneError


def ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException
) -> tuple[int, str]:
    """Return exit code and error output of a command that raises."""
    app = typer.Typer(cls=errors.Group, pretty_exceptions_enable=False)

    @app.command()
    def work() -> None:
        raise raised

    @app.command()
    def rest() -> None: ...

    monkeypatch.setattr(cli, "app", lambda: app(["work"]))
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(str(end.value.code)), capsys.readouterr().err


OS_ERRORS = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: No space left.*free some space"),
    "read only": (OSError(errno.EROFS, "Read-only file system", "/usr/x"), "/usr/x: Read-only.*can be written"),
    "denied": (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "/root/x: Permission denied.*may read"),
    "a file": (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"f/x"), "f/x: Not a directory; there is a file"),
    "too long": (OSError(errno.ENAMETOOLONG, "File name too long", "n"), "n: File name too long; choose a shorter"),
    "files": (OSError(errno.EMFILE, "Too many open files"), "Too many open files.*ulimit"),
    "no text": (OSError("the library says so"), "OSError: the library says so$"),
    "two names": (FileNotFoundError(errno.ENOENT, "No such file", "a", None, "b"), "b: No such file"),
}


@pytest.mark.parametrize("what", OS_ERRORS)
def test_every_error_of_the_file_system_is_one_line_with_its_remedy(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, told = OS_ERRORS[what]
    code, shown = ended(monkeypatch, capsys, error)
    assert code == 1
    assert len(shown.splitlines()) == 1
    assert re.search(told, shown.strip()), shown


def test_an_error_in_the_cache_says_where_the_cache_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    error = FileExistsError(errno.EEXIST, "File exists", str(tmp_path / "cache/models"))
    assert "downloads and converted models lie in FEDTUNE_CACHE" in ended(monkeypatch, capsys, error)[1]


def test_what_should_not_happen_is_one_line_with_its_place_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = ended(monkeypatch, capsys, AttributeError("no\nsuch thing"))
    assert code == 1
    assert len(shown.splitlines()) == 1
    assert "unexpected AttributeError: no such thing" in shown
    assert "please report it" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv(errors.TRACEBACK, "1")
    assert "Traceback" in ended(monkeypatch, capsys, KeyError("x"))[1]


def test_the_place_is_in_our_own_code() -> None:
    with pytest.raises(TypeError) as raised:
        expanded(5)  # type: ignore[arg-type]
    assert "(machine.py:" in errors.said(raised.value)[0]


ENDINGS = {
    "a cut file": (EOFError("Compressed file ended"), 1, "CorruptFileError: a file ends too early"),
    "an empty one": (EOFError(), 1, "nothing more to read"),
    "ours": (DataError("no rows"), 1, "DataError: no rows"),
    "cancelled": (CancelledError(15), 143, "cancelled by signal 15"),
    "memory": (MemoryError(), 1, "out of memory: no memory left; smaller passes"),
}


@pytest.mark.parametrize("what", ENDINGS)
def test_other_ends(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error, wanted, told = ENDINGS[what]
    code, shown = ended(monkeypatch, capsys, error)
    assert code == wanted
    assert told in shown
    assert "Aborted" not in shown


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDTUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(FedtuneError, match="no home folder; set FEDTUNE_CACHE"):
        cache_dir()
    assert expanded("~nobody/x") == Path("~nobody/x")
    monkeypatch.setenv("FEDTUNE_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "0.5–0.7 ± 1 … 3×4 “a”", '0.5-0.7 +/- 1 ... 3x4 "a"'),
        ("ascii", "é 中 😀", "\\u00e9 \\u4e2d \\U0001f600"),
        ("latin-1", "é – 中", "é - \\u4e2d"),
        ("utf-8", "é – 中 \udcff", "é – 中 \\udcff"),
    ],
)
def test_characters_that_the_terminal_lacks_are_shown_plainly(
    encoding: str, text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    errors.encodable()
    print(text, end="", flush=True)
    assert raw.getvalue().decode(encoding) == shown


def fedtune(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "fedtune", *words]
    return subprocess.run(command, capture_output=True, check=False, cwd=cwd, env={**os.environ, **variables})


def test_a_run_on_an_ascii_terminal_ends_well(settings: Callable[..., Settings], tmp_path: Path) -> None:
    made = settings(federation={"clients": 2, "rounds": 1}, train={"max_steps": 1}, eval={"limit": 4, "base": True})
    (tmp_path / "é.toml").write_bytes(tomli_w.dumps(made.config.plain()).encode())
    done = fedtune("run", "-c", "é.toml", "--out", "sortie-é", "--json", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stderr.isascii()
    assert json.loads(done.stdout)["rounds"] == 1
    assert b"sortie-" in done.stderr


def _written(place: Path, words: list[str], **variables: str) -> subprocess.CompletedProcess[bytes]:
    done = fedtune(*words, cwd=place, **variables)
    assert b"Traceback" not in done.stderr
    assert done.returncode not in (0, -13), done.stdout
    return done


@pytest.mark.parametrize("out", ["file", "file/below", "n" * 300])
def test_a_folder_that_cannot_be_made_is_one_line_at_every_command(
    out: str, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("here")
    common = ["--data", str(data_folder), "--out", out]
    for words in (
        ["run", "finance", "--model", str(tiny_folder), *common],
        ["eval", str(tiny_folder), "--domain", "finance", *common],
    ):
        done = _written(tmp_path, words)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert b"choose" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_reader_that_goes_away_ends_a_list_quietly(tmp_path: Path) -> None:
    head = f"{sys.executable} -m fedtune ls tasks --json | head -c 1"
    done = subprocess.run(["bash", "-c", head], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout == b"["
    assert done.stderr == b""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare to take the user's name away")
def test_a_container_without_home_or_user_name_is_told_what_to_set(tmp_path: Path) -> None:
    words = ["unshare", "-U", "--map-user=12345", "--map-group=12345", sys.executable, "-m", "fedtune", "doctor"]
    bare: dict[str, Any] = {k: v for k, v in os.environ.items() if k not in ("HOME", "FEDTUNE_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=bare, cwd=tmp_path)
    if "unshare" in done.stderr:
        pytest.skip("this kernel gives no user namespace")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "FedtuneError: this user has no home folder; set FEDTUNE_CACHE to a folder for downloads and models"
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=tmp_path, env={**bare, "FEDTUNE_CACHE": "c"}
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_is_a_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(monkeypatch, capsys, KeyboardInterrupt()) == (130, "cancelled by Ctrl-C\n")


@pytest.mark.parametrize("module", ["typer", "fedtune.evaluation.published"])
def test_ctrl_c_during_imports_is_a_line_and_130(module: str) -> None:
    """One module is imported before any command, one by a command."""
    code = (
        "import runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv = ['fedtune', 'score', 'fpb', 'none.json']\n"
        "runpy.run_module('fedtune', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "cancelled by Ctrl-C\n")
