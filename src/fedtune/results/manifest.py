"""Who made a run: code, versions, machine. No torch here; versions are read from package metadata."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.io import digest, file_sha256

PACKAGES = ("torch", "transformers", "peft", "flwr", "flwr-datasets", "datasets", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of what decides numbers."""
    return {"fedtune": __version__, "python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def source_sha256(root: Path) -> str:
    """Return the hash of the source files of a package's folder, or of a single module."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in (".py", ".toml"))
    return digest({str(p.relative_to(root)): file_sha256(p) for p in files})


@cache
def code_sha256() -> str:
    """Return the hash of the installed package's own source files, which needs no git."""
    return source_sha256(Path(__file__).parents[1])


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(Path(__file__).parent), *words],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code() -> dict[str, Any]:
    """Return the code's identity: source hash, and commit and dirty flag where it runs from a checkout."""
    commit = _git("rev-parse", "HEAD")
    dirty = _git("status", "--porcelain", "--", str(Path(__file__).parents[1])) if commit else None
    return {"sha256": code_sha256(), "commit": commit, "dirty": None if dirty is None else bool(dirty)}


def machine() -> dict[str, Any]:
    """Return what the machine is, without its name."""
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "processor": _processor(),
        "gpus": _gpus(),
    }


def _gpus() -> int:
    """Count NVIDIA devices as the driver lists them; no library is needed for that."""
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        return 0


def energy_counters(root: Path = Path("/sys/class/powercap")) -> dict[str, tuple[int, int]]:
    """Return each processor package's energy counter and its range in microjoules (RAPL), where they may be read."""
    found = {}
    for zone in sorted(root.glob("intel-rapl:?")):
        try:
            value, limit = (int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            continue  # most systems let only root read them
        found[zone.name] = (value, limit)
    return found


def energy_since(start: dict[str, tuple[int, int]], root: Path = Path("/sys/class/powercap")) -> float | None:
    """Return joules since a reading, a counter that wrapped around once included; None where nothing can be read."""
    now = energy_counters(root)
    shared = start.keys() & now.keys()
    if not shared:
        return None
    return sum((now[z][0] - start[z][0]) % max(1, now[z][1]) for z in shared) / 1e6


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the places where two documents differ, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in difference(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path}: {old!r:.500} -> {new!r:.500}"]
