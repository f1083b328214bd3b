"""What is fetched or made once on a machine and then kept: whoever comes second waits for the first."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from fedtune.machine import cache_dir

log = logging.getLogger("fedtune")


@contextlib.contextmanager
def made_once(target: Path) -> Iterator[None]:
    """Hold the right to make `target`, of this machine's cache; another process or thread waits here until it is free.

    Look again whether `target` is there once it is held. The kernel lets go when a process dies, however it dies.

    Raises:
        OSError: the cache cannot be written, or its file system has no locks.
    """
    lock = cache_dir() / "locks" / f"{target.parent.name}-{target.name}"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that makes %s", target)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
