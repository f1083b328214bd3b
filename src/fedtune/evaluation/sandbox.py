"""Run programs nobody has read: no network, nothing to read or write, limits on everything, nothing left behind.

Bubblewrap where it works, else docker or podman, else nothing is run. It stops harm, not cheating: a program
that looks for the secret of its own test run can find it, so verified scores need regenerated programs.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from fedtune.types import FedtuneError

Kind = Literal["passed", "wrong", "error", "timeout", "out-of-memory", "killed", "no-sandbox"]
MEBIBYTE = 1024**2
FIRST_USER, USERS = 200_000, 1_000_000
TMP_BYTES = 64 * MEBIBYTE
IMAGE = os.environ.get("FEDTUNE_SANDBOX_IMAGE", "docker.io/library/python:3.11")
MISSING = (
    f"install bubblewrap (apt install bubblewrap), or docker or podman with the image {IMAGE} (FEDTUNE_SANDBOX_IMAGE "
    "names another); generated code is never run without one"
)


class SandboxError(FedtuneError):
    """There is no sandbox on this machine, or a language's tool is missing; the message says what to install."""


@dataclass(frozen=True)
class Limits:
    """What one command may use.

    Attributes:
        seconds: wall clock; the processor gets one second more.
        memory: bytes a process may map (for node: allocate).
        processes: processes and threads of the whole sandbox.
        output: bytes of standard output and error each, and of any file.
    """

    seconds: float
    memory: int = 2048 * MEBIBYTE
    processes: int = 64
    output: int = 4 * MEBIBYTE


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
with open("/work/program.py", encoding="utf-8", errors="surrogateescape") as _handle:
    _source = _handle.read()
exec(compile(_source, "program.py", "exec"), {})
sys.stdout.write("\\n" + _token)
sys.stdout.flush()
"""

PYTHON = Language(
    "python",
    "program.py",
    (sys.executable, "-B", "/work/runner.py", "{token}"),
    Limits(3.0),
    extra={"runner.py": _RUNNER},
)
JAVASCRIPT = Language(
    "javascript",
    "program.js",
    ("node", "--max-old-space-size=1024", "/work/program.js"),
    Limits(5.0),
    tool="node",
    finish="\n;process.stdout.write('\\n{token}');\n",
    map_limit=False,
)
CPP = Language(
    "c++",
    "program.cpp",
    ("/tmp/program",),  # noqa: S108 - private to the sandbox
    Limits(15.0),
    compile=("g++", "-std=c++17", "-o", "/tmp/program", "/work/program.cpp"),  # noqa: S108
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


def _readable() -> list[str]:
    """Return the folders a program needs to see: the system's programs and libraries, and this Python."""
    system = ["/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin"]
    python = [sys.prefix, sys.base_prefix]
    return [p for p in dict.fromkeys([*system, *python]) if Path(p).exists()]


def _bubblewrap(folder: Path, scratch: Path | None) -> list[str]:
    """Return the command that enters a sandbox in which only /tmp can be written: `scratch`, else in memory.

    Root gets no user namespace but a user of its own inside: the kernel does not limit the number of
    root's processes, whatever the namespace calls it, so a fork bomb would not stop.
    """
    words = ["bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    words += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:
        words += [word for cap in ("SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{cap}")]
    else:
        words += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    # a fixed hash seed: whether a program passes must not hang on the order of a set
    known = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "0"}  # noqa: S108
    words += [word for name, value in known.items() for word in ("--setenv", name, value)]
    # /tmp first, so that a Python that lives below it is seen through it
    in_memory = ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]  # noqa: S108
    words += ["--bind", str(scratch), "/tmp"] if scratch else in_memory  # noqa: S108
    for path in _readable():
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    return [*words, "--ro-bind", str(folder), "/work", "--chdir", "/tmp"]  # noqa: S108


def _nobody() -> list[str]:
    """Return the command by which root's sandbox becomes a user without rights, a different one each time."""
    if os.geteuid() != 0:
        return []
    user = str(FIRST_USER + secrets.randbelow(USERS))
    words = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--no-new-privs"]
    return [*words, "--inh-caps=-all", "--bounding-set=-all"]


def _container(name: str, folder: Path, scratch: Path, limits: Limits) -> list[str]:
    """Return the command that enters a container; it ends by itself, since killing the client would not end it."""
    words = [name, "run", "--rm", "-i", "--pull", "never", "--network", "none", "--read-only", "--cap-drop", "ALL"]
    words += ["--security-opt", "no-new-privileges", "--user", "65534:65534", "--pids-limit", str(limits.processes)]
    words += ["--memory", str(limits.memory), "--memory-swap", str(limits.memory)]
    words += ["--workdir", "/tmp", "--env", "HOME=/tmp", "--env", "PYTHONHASHSEED=0"]  # noqa: S108
    words += ["-v", f"{scratch}:/tmp", "-v", f"{folder}:/work:ro", IMAGE]
    return [*words, "timeout", "-s", "KILL", str(int(limits.seconds) + 2)]


def _works(words: Sequence[str]) -> bool:
    try:
        return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return False


@cache
def engine() -> str | None:
    """Return the sandbox that works here: `bwrap`, `docker`, `podman`, or None."""
    with tempfile.TemporaryDirectory() as empty:
        if shutil.which("bwrap") and _works([*_bubblewrap(Path(empty), None), *_nobody(), "true"]):
            return "bwrap"
        for name in ("docker", "podman"):
            if shutil.which(name) and _works([*_container(name, Path(empty), Path(empty), Limits(30.0)), "true"]):
                return name
    return None


@cache
def _has_tool(tool: str) -> bool:
    """Tell whether a tool is there where programs run: on this machine, or in the container's image."""
    name = engine()
    if name in (None, "bwrap"):
        return shutil.which(tool) is not None
    with tempfile.TemporaryDirectory() as empty:
        inside = _container(str(name), Path(empty), Path(empty), Limits(30.0))
        return _works([*inside, "sh", "-c", f"command -v {tool}"])


def require(language: Language) -> None:
    """Make sure programs of a language can be run here.

    Raises:
        SandboxError: saying what to install.
    """
    if engine() is None:
        raise SandboxError(f"no sandbox works on this machine: {MISSING}")
    if language.tool and not _has_tool(language.tool):
        raise SandboxError(f"{language.name} programs need {language.tool}, which is not installed; other tasks go on")


def _limited(limits: Limits, map_limit: bool) -> list[str]:
    """Return the command that lowers the kernel's limits before anything else runs."""
    memory = f"--{'as' if map_limit else 'data'}={limits.memory}"
    seconds = int(limits.seconds) + 1
    return [
        "prlimit",
        f"--cpu={seconds}",
        memory,
        f"--fsize={limits.output}",
        "--core=0",
        f"--nproc={limits.processes}",
    ]


def _command(
    words: Sequence[str], limits: Limits, map_limit: bool, folder: Path, scratch: Path, *, keep: bool = False
) -> list[str]:
    """Return the whole command; `keep` leaves /tmp in `scratch` for the next one (a compiler's output)."""
    name = engine()
    if name is None:
        raise SandboxError(f"no sandbox works on this machine: {MISSING}")
    limited = _limited(limits, map_limit)
    if name == "bwrap":
        return [*_bubblewrap(folder, scratch if keep else None), *limited, *_nobody(), *words]
    # the image has a Python of its own
    own = ["python3" if word == sys.executable else word for word in words]
    return [*_container(name, folder, scratch, limits), *limited, *own]


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
    with open(out, "wb") as out_handle, open(err, "wb") as err_handle:
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=out_handle, stderr=err_handle, start_new_session=True
        )
        try:
            code: int | None = process.wait(limits.seconds)
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
    if ended.code is None:
        return Outcome("timeout", detail)
    if ended.code == 0:
        return Outcome("passed") if ended.out.endswith(token) else Outcome("wrong", "ended before its last assertion")
    if _MEMORY.search(detail):
        return Outcome("out-of-memory", detail)
    if _WRONG.search(detail):
        return Outcome("wrong", detail)
    if ended.code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL, 128 + signal.SIGXFSZ):
        return Outcome("killed", detail)
    return Outcome("error", detail, compiled=_SYNTAX.search(detail) is None)


def _compile(language: Language, folder: Path, scratch: Path, logs: Path) -> Outcome | None:
    """Compile where the language needs it; None when that went well."""
    if not language.compile:
        return None
    limits = Limits(language.limits.seconds, output=64 * MEBIBYTE)
    ended = _call(_command(language.compile, limits, True, folder, scratch, keep=True), limits, logs)
    if ended.code == 0:
        return None
    return Outcome("timeout" if ended.code is None else "error", ended.err[-2000:], compiled=False)


def execute(program: str, language: Language, finish: str = "") -> Outcome:
    """Run one program with its tests.

    Args:
        program: candidate and tests.
        language: how.
        finish: text put after the program, in which `{token}` is the run's secret; the language's own by default.

    Returns:
        The outcome; `no-sandbox` where nothing could be run.
    """
    if engine() is None:
        return Outcome("no-sandbox", MISSING, compiled=False)
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="fedtune-") as room:
        folder, scratch, logs = (Path(room) / name for name in ("work", "tmp", "logs"))
        for path in (folder, scratch, logs):
            path.mkdir()
        os.chmod(room, 0o755)  # noqa: S103 - the sandbox's user is nobody
        os.chmod(scratch, 0o777)  # noqa: S103
        text = program + (finish or language.finish).replace("{token}", token)
        (folder / language.file).write_bytes(text.encode("utf-8", "surrogatepass"))
        for name, content in language.extra.items():
            (folder / name).write_text(content, encoding="utf-8")
        if failed := _compile(language, folder, scratch, logs):
            return failed
        words = [word.replace("{token}", token) for word in language.run]
        kept = bool(language.compile)
        command = _command(words, language.limits, language.map_limit, folder, scratch, keep=kept)
        return _judge(_call(command, language.limits, logs), token)


def execute_all(
    programs: Sequence[tuple[str, str]], language: Language, on_done: Callable[[int], None] | None = None
) -> Iterator[Outcome]:
    """Run many programs, as many at a time as there are cores, and yield their outcomes in order.

    Args:
        programs: (program with tests, finish) each.
        language: of all.
        on_done: called with the number done so far.
    """
    require(language)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        running = [pool.submit(execute, program, language, finish) for program, finish in programs]
        try:
            for number, future in enumerate(running, 1):
                yield future.result()
                if on_done:
                    on_done(number)
        finally:
            for future in running:
                future.cancel()
