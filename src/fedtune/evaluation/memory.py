"""Bound the memory of a sandbox as a whole, by a control group, where this user may make one.

The limits of the kernel that need no right (`prlimit`) are a process's own; a program may start many, and what it
writes into shared memory counts for none of them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fedtune.evaluation.confine import MEBIBYTE

ROOT = Path("/sys/fs/cgroup")
PATIENCE = 2.0
# should entering fail, the limits of each process still hold
_ENTER = ("sh", "-c", 'echo $$ >"$0"; exec "$@"')


def _parents() -> Iterator[Path]:
    """Yield folders in which groups with a limit of memory can be made, if this user may."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            own = (ROOT if not kinds else ROOT / "memory") / path.lstrip("/")
            if "memory" in kinds.split(","):
                yield own
            elif not kinds:
                # version 2: a group has processes or a limit for those below it, not both
                above = [folder for folder in (own, *own.parents) if folder.is_relative_to(ROOT)]
                yield from (folder for folder in above if _passes_memory(folder))


def _passes_memory(folder: Path) -> bool:
    try:
        return "memory" in (folder / "cgroup.subtree_control").read_text(encoding="utf-8").split()
    except OSError:
        return False


@contextlib.contextmanager
def _group(parent: Path, most: int) -> Iterator[list[str]]:
    folder = parent / f"fedtune-{os.getpid()}-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        first = folder / "memory.max"
        (first if first.exists() else folder / "memory.limit_in_bytes").write_text(str(most), encoding="ascii")
        for name, swap in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", most)):
            if (folder / name).exists():
                (folder / name).write_text(str(swap), encoding="ascii")
        yield [*_ENTER, str(folder / "cgroup.procs")]
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a group as soon as the kernel has taken away the last of its processes, which were killed."""
    deadline = time.monotonic() + PATIENCE
    while folder.exists() and time.monotonic() < deadline:
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.01)


def _sweep(parent: Path) -> None:
    """Remove the empty groups of processes that were killed."""
    for folder in parent.glob("fedtune-*-*"):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


@cache
def _parent() -> Path | None:
    """Return where groups can be made and entered by this process, having tried it."""
    for parent in _parents():
        try:
            with _group(parent, 64 * MEBIBYTE) as enter:
                inside = subprocess.run(  # noqa: S603
                    [*enter, "cat", "/proc/self/cgroup"], capture_output=True, text=True, timeout=10, check=True
                )
                if Path(enter[-1]).parent.name in inside.stdout:
                    _sweep(parent)
                    return parent
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def can_bound() -> bool:
    """Tell whether `bounded` bounds anything here."""
    return _parent() is not None


@contextlib.contextmanager
def bounded(most: int) -> Iterator[list[str]]:
    """Yield the words before a command that put it, and all that it starts, into a group of `most` bytes.

    The kernel kills the largest process of a group that needs more. No words where no group can be made.
    """
    parent = _parent()
    if parent is None:
        yield []
        return
    with contextlib.ExitStack() as stack:
        try:
            words = stack.enter_context(_group(parent, most))
        except OSError:
            words = []
        yield words
