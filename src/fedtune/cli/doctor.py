"""`fedtune doctor`: what this machine has."""

from __future__ import annotations

import importlib.util
import os
import shutil

import typer

from fedtune import PRIVATE


def _cache() -> str:
    from fedtune.machine import cache_dir

    path = cache_dir()
    existing = next(p for p in (path, *path.parents) if p.exists())
    return f"{path} ({shutil.disk_usage(existing).free / 1024**3:.0f} GiB free)"


def _telemetry() -> str:
    """Say which reports of libraries somebody has switched on."""
    on = [name for name, off in PRIVATE.items() if os.environ.get(name) != off]
    return "off" if not on else "NOT OFF: " + ", ".join(f"{name}={os.environ.get(name)}" for name in on)


def _sandbox() -> str:
    from fedtune.evaluation.confine import engine
    from fedtune.evaluation.memory import can_bound

    name = engine()
    if name is None:
        return "none: generated code is never run (apt install bubblewrap)"
    whole = name != "bwrap" or can_bound()
    return f"{name}, memory bounded " + ("as a whole" if whole else "for each process only (no control group)")


def doctor() -> None:
    """Show what this machine has, what each job still needs, and what would be sent over the network."""
    from fedtune.data.packages import index_url
    from fedtune.results.manifest import versions

    for name, version in versions().items():
        typer.echo(f"{name:16} {version}")
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    facts = {
        "accelerator": "nvidia-smi found" if shutil.which("nvidia-smi") else "none (CPU, float32)",
        "cache": _cache(),
        "package index": index_url(),
        "Hub": "offline (HF_HUB_OFFLINE)" if offline else "online if reachable; HF_HUB_OFFLINE=1 forbids it",
        "telemetry": _telemetry(),
        "simulation": "ray found" if importlib.util.find_spec("ray") else "pip install 'fedtune[simulation]'",
        "4/8-bit": "bitsandbytes found"
        if importlib.util.find_spec("bitsandbytes")
        else "pip install 'fedtune[quantization]'",
        "code sandbox": _sandbox(),
    }
    for name, fact in facts.items():
        typer.echo(f"{name:16} {fact}")
    typer.echo("outbound: requests to the package index and the Hub, for what a run asks for; nothing else is sent")
