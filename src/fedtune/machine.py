"""What this machine lets the process use. No torch here."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fedtune.types import FedtuneError

# processor time that a control group may use, and the period it is for, in microseconds: version 2, then 1
_QUOTAS = (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def _quota(root: Path) -> float:
    """Return how many cores' time the control group gives this process; infinite where it does not say."""
    for name, period in _QUOTAS:
        try:
            words = (root / name).read_text().split() + ((root / period).read_text().split() if period else [])
            allowed, per = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):
            continue
        return allowed / per if allowed > 0 and per > 0 else math.inf
    return math.inf


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores this process may use: by its affinity, and by the quota of its container."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(mine, _quota(root))))


def expanded(path: str | Path) -> Path:
    """Return a path with `~` written out; where nobody knows that home, `~` is a name like any other."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_dir() -> Path:
    """Return the folder for downloads and converted models (`FEDTUNE_CACHE`, else the XDG cache).

    Raises:
        FedtuneError: there is no home to have a cache in.
    """
    if root := os.environ.get("FEDTUNE_CACHE"):
        return Path(root)
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "fedtune"
    home = expanded("~")
    if not home.is_absolute():
        raise FedtuneError("this user has no home folder; set FEDTUNE_CACHE to a folder for downloads and models")
    return home / ".cache" / "fedtune"
