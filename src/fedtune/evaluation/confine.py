"""Enter a sandbox: bubblewrap where it works, else a container, else nowhere.

What is inside sees the system's programs and libraries read-only, an empty environment, no network, and a /tmp of
its own. The kernel's limits are lowered before anything else runs.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedtune.types import FedtuneError

MEBIBYTE = 1024**2
PATIENCE = 10
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
        seconds: processor time of each process. The clock gives `PATIENCE` times as much, so that what else runs on
            the machine does not decide which programs pass; only what waits for nothing is stopped by it.
        memory: bytes a process may map (for node: allocate), and, where that can be bounded, all of them together.
        processes: processes and threads of the whole sandbox.
        output: bytes of standard output and error each, and of any file.
    """

    seconds: float
    memory: int = 2048 * MEBIBYTE
    processes: int = 64
    output: int = 4 * MEBIBYTE

    @property
    def clock(self) -> float:
        """Seconds of the clock after which a command is stopped whatever it does."""
        return PATIENCE * self.seconds


def _readable() -> list[str]:
    """Return the folders a program needs to see: the system's programs and libraries, and this Python."""
    system = ["/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin"]
    python = [sys.prefix, sys.base_prefix]
    return [p for p in dict.fromkeys([*system, *python]) if Path(p).exists()]


def _bubblewrap(folder: Path) -> list[str]:
    """Return the command that enters a sandbox in which only /tmp can be written, in memory.

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
    words += ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]  # noqa: S108
    for path in _readable():
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    return [*words, "--ro-bind", str(folder), "/job", "--chdir", "/tmp"]  # noqa: S108


def _nobody() -> list[str]:
    """Return the command by which root's sandbox becomes a user without rights, a different one each time."""
    if os.geteuid() != 0:
        return []
    user = str(FIRST_USER + secrets.randbelow(USERS))
    words = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--no-new-privs"]
    return [*words, "--inh-caps=-all", "--bounding-set=-all"]


def _container(name: str, folder: Path, limits: Limits) -> list[str]:
    """Return the command that enters a container; it ends by itself, since killing the client would not end it."""
    words = [name, "run", "--rm", "-i", "--pull", "never", "--network", "none", "--read-only", "--cap-drop", "ALL"]
    words += ["--security-opt", "no-new-privileges", "--user", "65534:65534", "--pids-limit", str(limits.processes)]
    words += ["--memory", str(limits.memory), "--memory-swap", str(limits.memory)]
    words += ["--workdir", "/tmp", "--env", "HOME=/tmp", "--env", "PYTHONHASHSEED=0"]  # noqa: S108
    words += ["--tmpfs", f"/tmp:rw,exec,nosuid,mode=1777,size={TMP_BYTES}"]  # noqa: S108
    words += ["-v", f"{folder}:/job:ro", IMAGE]
    return [*words, "timeout", "-s", "KILL", str(int(limits.clock) + 2)]


def _works(words: Sequence[str]) -> bool:
    try:
        return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return False


@cache
def engine() -> str | None:
    """Return the sandbox that works here: `bwrap`, `docker`, `podman`, or None."""
    with tempfile.TemporaryDirectory() as empty:
        if shutil.which("bwrap") and _works([*_bubblewrap(Path(empty)), *_nobody(), "true"]):
            return "bwrap"
        for name in ("docker", "podman"):
            if shutil.which(name) and _works([*_container(name, Path(empty), Limits(30.0)), "true"]):
                return name
    return None


@cache
def has_tool(tool: str) -> bool:
    """Tell whether a tool is there where programs run: on this machine, or in the container's image."""
    name = engine()
    if name in (None, "bwrap"):
        return shutil.which(tool) is not None
    with tempfile.TemporaryDirectory() as empty:
        inside = _container(str(name), Path(empty), Limits(30.0))
        return _works([*inside, "sh", "-c", f"command -v {tool}"])


def command(words: Sequence[str], limits: Limits, map_limit: bool, folder: Path, out: Path | None = None) -> list[str]:
    """Return the whole command, which lowers the kernel's limits before anything else runs; there is an engine.

    What it leaves in /out is in `out` afterwards (a compiler's output).
    """
    seconds = math.ceil(limits.seconds)
    # the first limit of seconds can be told from other deaths, the second one cannot be caught
    limited = ["prlimit", f"--cpu={seconds}:{seconds + 1}", f"--{'as' if map_limit else 'data'}={limits.memory}"]
    limited += [f"--fsize={limits.output}", "--core=0", f"--nproc={limits.processes}"]
    name = engine()
    if name == "bwrap":
        return [*_bubblewrap(folder), *limited, *_nobody(), *words]
    # the image has a Python of its own
    own = ["python3" if word == sys.executable else word for word in words]
    # what is printed comes through a pipe of the container's, so its client is bounded as well
    client = ["prlimit", f"--fsize={limits.output}"]
    return [*client, *_container(str(name), folder, limits), *limited, *own]
