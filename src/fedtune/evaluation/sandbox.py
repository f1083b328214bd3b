"""Run programs nobody has read: no network, nothing to read or write, limits on what they use, nothing left behind.

Bubblewrap where it works, else docker or podman, else nothing is run. It stops harm, not cheating: a program
that looks for the secret of its own test run can find it, so verified scores need regenerated programs.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedtune.evaluation.confine import MEBIBYTE, MISSING, TMP_BYTES, Limits, SandboxError, command, engine, has_tool
from fedtune.evaluation.memory import bounded
from fedtune.machine import cores

SLACK = 64 * MEBIBYTE  # for what enters the sandbox and for the kernel, so that one process has all of its memory

Kind = Literal["passed", "wrong", "error", "timeout", "out-of-memory", "killed", "no-sandbox"]


@dataclass(frozen=True)
class Language:
    """How a program is stored, compiled and run. `{file}` and `{exe}` stand for paths inside the sandbox."""

    name: str
    file: str
    run: tuple[str, ...]
    limits: Limits
    compile: tuple[str, ...] = ()
    tool: str = ""
    finish: str = ""
    extra: dict[str, str] = field(default_factory=dict)
    map_limit: bool = True


_RUNNER = """import sys
_token = sys.argv[1]
with open("/job/program.py", encoding="utf-8", errors="surrogateescape") as _handle:
    _source = _handle.read()
exec(compile(_source, "program.py", "exec"), {})
sys.stdout.write("\\n" + _token)
sys.stdout.flush()
"""

PYTHON = Language(
    "python",
    "program.py",
    (sys.executable, "-B", "/job/runner.py", "{token}"),
    Limits(3.0),
    extra={"runner.py": _RUNNER},
)
JAVASCRIPT = Language(
    "javascript",
    "program.js",
    ("node", "--max-old-space-size=1024", "/job/program.js"),
    Limits(5.0),
    tool="node",
    finish="\n;process.stdout.write('\\n{token}');\n",
    map_limit=False,
)
# what a compiler writes stays in memory with all else in /tmp; the executable comes out as what the command prints
_COMPILE = (
    "g++ -std=c++17 -o /tmp/program /job/program.cpp 2> /tmp/errors; code=$?; "
    "tail -c 8192 /tmp/errors >&2; [ $code = 0 ] && cat /tmp/program; exit $code"
)
CPP = Language(
    "c++",
    "program.cpp",
    ("/job/program",),
    Limits(15.0),
    compile=("sh", "-c", _COMPILE),
    tool="g++",
)


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        kind: `passed` only if it exited with 0 *and* printed this run's secret after its last assertion.
        detail: the end of what it wrote to standard error.
        compiled: whether it got as far as running.
    """

    kind: Kind
    detail: str = ""
    compiled: bool = True


def lacking(language: Language) -> str:
    """Say which tool programs of a language lack here, or return an empty string.

    Raises:
        SandboxError: no program can be run here, saying what to install.
    """
    if engine() is None:
        raise SandboxError(f"no sandbox works on this machine: {MISSING}")
    if language.tool and not has_tool(language.tool):
        return f"{language.name} programs need {language.tool}, which is not installed; other tasks go on"
    return ""


@dataclass(frozen=True)
class _Ended:
    code: int | None
    out: str
    err: str


def _tail(path: Path, most: int) -> str:
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - most))
        return handle.read().decode("utf-8", "replace")


def _call(command: Sequence[str], limits: Limits, logs: Path) -> _Ended:
    """Run one command; output goes to files, which the file-size limit bounds. A None code is a timeout."""
    out, err = logs / "out", logs / "err"
    whole = limits.memory + TMP_BYTES + SLACK
    with open(out, "wb") as out_handle, open(err, "wb") as err_handle, bounded(whole) as enter:
        process = subprocess.Popen(  # noqa: S603
            [*enter, *command], stdin=subprocess.DEVNULL, stdout=out_handle, stderr=err_handle, start_new_session=True
        )
        try:
            code: int | None = process.wait(limits.clock)
        except subprocess.TimeoutExpired:
            code = None
            # bwrap's child is the first process of its own namespace: when it dies, all of it dies
            process.kill()
            process.wait()
    return _Ended(code, _tail(out, 64 * 1024), _tail(err, 8 * 1024))


_MEMORY = re.compile(r"MemoryError|std::bad_alloc|heap out of memory|Cannot allocate memory|ENOMEM|out of memory", re.I)
_WRONG = re.compile(r"AssertionError|Assertion .*failed|ERR_ASSERTION", re.I)
_SYNTAX = re.compile(r"^(SyntaxError|IndentationError|TabError)\b", re.M)


def _judge(ended: _Ended, token: str) -> Outcome:
    """Turn an ended command into an outcome; passing needs the exit code and the secret."""
    detail = ended.err[-2000:]
    if ended.code in (None, 128 + signal.SIGXCPU):
        return Outcome("timeout", detail)
    if ended.code == 0:
        return Outcome("passed") if ended.out.endswith(token) else Outcome("wrong", "ended before its last assertion")
    if _MEMORY.search(detail):
        return Outcome("out-of-memory", detail)
    if _WRONG.search(detail):
        return Outcome("wrong", detail)
    if ended.code in (128 + signal.SIGKILL, 128 + signal.SIGXFSZ):
        return Outcome("killed", detail)
    return Outcome("error", detail, compiled=_SYNTAX.search(detail) is None)


def _compile(language: Language, folder: Path, logs: Path) -> Outcome | None:
    """Compile where the language needs it; None when that went well."""
    if not language.compile:
        return None
    limits = Limits(language.limits.seconds, output=64 * MEBIBYTE)
    ended = _call(command(language.compile, limits, True, folder), limits, logs)
    if ended.code == 0:
        os.replace(logs / "out", folder / "program")
        os.chmod(folder / "program", 0o755)  # noqa: S103 - the sandbox's user is nobody
        return None
    slow = ended.code in (None, 128 + signal.SIGXCPU)
    return Outcome("timeout" if slow else "error", ended.err[-2000:], compiled=False)


def execute(program: str, language: Language, finish: str = "") -> Outcome:
    """Run one program with its tests.

    Args:
        program: candidate and tests.
        finish: text put after the program, in which `{token}` is the run's secret; the language's own by default.

    Returns:
        The outcome; `no-sandbox` where nothing could be run.
    """
    if engine() is None:
        return Outcome("no-sandbox", MISSING, compiled=False)
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="fedtune-") as root:
        folder, logs = (Path(root) / name for name in ("work", "logs"))
        for path in (folder, logs):
            path.mkdir()
        os.chmod(root, 0o755)  # noqa: S103 - the sandbox's user is nobody
        text = program + (finish or language.finish).replace("{token}", token)
        (folder / language.file).write_bytes(text.encode("utf-8", "surrogatepass"))
        for name, content in language.extra.items():
            (folder / name).write_text(content, encoding="utf-8")
        if failed := _compile(language, folder, logs):
            return failed
        words = [word.replace("{token}", token) for word in language.run]
        entered = command(words, language.limits, language.map_limit, folder)
        return _judge(_call(entered, language.limits, logs), token)


def execute_all(
    programs: Sequence[tuple[str, str]], language: Language, on_done: Callable[[int], None] | None = None
) -> Iterator[Outcome]:
    """Run many programs, as many at a time as this process has cores, and yield their outcomes in order.

    Args:
        programs: (program with tests, finish) each.
        on_done: called with the number done so far.

    Raises:
        SandboxError: no sandbox, or the language's tool is missing.
    """
    if why := lacking(language):
        raise SandboxError(why)
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        running = [pool.submit(execute, program, language, finish) for program, finish in programs]
        try:
            for number, future in enumerate(running, 1):
                yield future.result()
                if on_done:
                    on_done(number)
        finally:
            for future in running:
                future.cancel()
