"""The folder of a run: made, locked, identified, resumed only if it is the same run."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from fedtune.config import Config, Settings
from fedtune.io import digest, read_json, reading, write_bytes, write_json
from fedtune.machine import expanded
from fedtune.models.source import settings_files
from fedtune.models.zoo import is_local
from fedtune.results.manifest import (
    code,
    code_sha256,
    difference,
    energy_counters,
    energy_since,
    machine,
    peak_memory,
    versions,
)
from fedtune.results.schema import SCHEMA_VERSION
from fedtune.settings import outside
from fedtune.types import CancelledError, CorruptFileError, FedtuneError, ResumeError

MANIFEST, SETTINGS = "manifest.json", "config.toml"
RUNS = Path("runs")


def fresh_folder(config: Config, root: Path = RUNS) -> Path:
    """Return a folder for a new run that no run has yet: a readable name, and the beginning of the settings' hash."""
    model = re.sub(r"[^A-Za-z0-9.]+", "-", config.model.name.rstrip("/").rsplit("/", 1)[-1])
    arm = "" if config.arm == "federated" else f"-{config.arm}"
    name = f"{config.domain}-{model}-{config.method.name}{arm}-{config.hash[:8]}-seed{config.seed}"
    candidates = [root / name, *(root / f"{name}-{i}" for i in range(2, 10_000))]
    return next(p for p in candidates if not (p / MANIFEST).exists())


def unfinished(root: Path = RUNS) -> Path | None:
    """Return the run folder that was last at work and is not complete."""
    found = []
    for path in root.glob(f"*/{MANIFEST}"):
        with contextlib.suppress(CorruptFileError), reading(path):
            if read_json(path).get("status") != "complete":
                found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def identity(config: Config, data_hash: str, revision: str, dtype: str) -> dict[str, Any]:
    """Return what must be the same for a run to be continued."""
    known = versions()
    local = is_local(config.model.name)
    others = {what: asdict(origin) for what, origin in outside(config).items()}
    return {
        "config": config.semantic(),
        "code": code_sha256(),
        "data": data_hash,
        "model_revision": revision,
        "model_files": settings_files(expanded(config.model.name)) if local else {},
        "dtype": dtype,
        **{name: known[name] for name in ("torch", "transformers", "tokenizers", "peft")},
        **({"outside": others} if others else {}),
    }


@dataclass
class RunFolder:
    """An open run folder, its manifest as on disk; a run and its continuation have the same `run_id`."""

    path: Path
    manifest: dict[str, Any]
    run_id: str
    energy: dict[str, tuple[int, int]] = field(default_factory=energy_counters)

    def update(self, **facts: Any) -> None:
        """Change facts of the manifest, on disk at once; energy adds up from update to update, over all attempts."""
        spent, self.energy = energy_since(self.energy), energy_counters()
        if spent is not None:
            facts["energy_joules"] = self.manifest.get("energy_joules", 0.0) + spent
        self.manifest.update(facts, peak_memory_bytes=peak_memory())
        write_json(self.path / MANIFEST, self.manifest)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add to the time a phase has taken over all attempts."""
        timings = dict(self.manifest.get("seconds", {}))
        timings[phase] = timings.get(phase, 0.0) + seconds
        self.update(seconds=timings)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _new_manifest(settings: Settings, known: Mapping[str, Any], unranked: tuple[str, ...]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": digest(known)[:16],
        "status": "running",
        "started": _now(),
        "protocol": settings.protocol.name,
        "protocol_sha256": settings.protocol.hash,
        "config_sha256": settings.config.hash,
        "unranked": list(unranked),
        "identity": dict(known),
        "code": code(),
        "versions": {**versions(), **{o.package: o.version for o in outside(settings.config).values()}},
        "machine": machine(),
        "seconds": {},
    }


def _whole(identity: Any) -> Any:
    """Return what identifies a run with all settings: those with their default are not written down."""
    try:
        return {**identity, "config": Config.model_validate(identity["config"]).plain()}
    except (LookupError, TypeError, ValueError):  # no run's, or that of another version
        return identity


def _check_same(path: Path, old: Mapping[str, Any], known: Mapping[str, Any], *, force: bool) -> list[str]:
    """Return what differs from the run in the folder, or refuse to go on."""
    changed = difference(_whole(old.get("identity")), _whole(dict(known)))
    if changed and not force:
        listed = "\n".join(f"  {line}" for line in changed)
        raise ResumeError(
            f"{path} was made by a different run:\n{listed}\n"
            "Start a new one with another --out, or continue with --force-resume (the run is then unranked)."
        )
    return changed


def open_run(
    path: Path,
    settings: Settings,
    known: Mapping[str, Any],
    unranked: tuple[str, ...],
    *,
    resume: bool,
    force: bool,
) -> RunFolder:
    """Create a run folder, or open one to be continued. The caller holds its lock.

    Raises:
        ResumeError: a run is there and `resume` was not asked for, or it is another run (with the diff).
    """
    exists = (path / MANIFEST).exists()
    if exists and not resume:
        raise ResumeError(f"{path} already holds a run; continue it with --resume, or choose another --out")
    if not exists:
        manifest = _new_manifest(settings, known, unranked)
        write_bytes(path / SETTINGS, tomli_w.dumps(settings.config.plain()).encode())
        write_json(path / MANIFEST, manifest)
        return RunFolder(path, manifest, manifest["run_id"])
    manifest = read_json(path / MANIFEST)
    with reading(path / MANIFEST):
        changed = _check_same(path, manifest, known, force=force)
        folder = RunFolder(path, manifest, str(manifest["run_id"]))
        # added to when the work is done
        math.fsum([*manifest.get("seconds", {}).values(), manifest.get("energy_joules", 0.0)])
        reasons = [*map(str, manifest["unranked"]), *(f"resumed although {c}" for c in changed)]
        again = [*manifest.get("resumed", []), _now()]
        folder.update(status="running", unranked=reasons, resumed=again)
    return folder


@contextlib.contextmanager
def status(folder: RunFolder) -> Iterator[None]:
    """Record how a run ended: complete, cancelled, or failed with the reason."""
    try:
        yield
    except CancelledError:
        folder.update(status="cancelled", finished=_now())
        raise
    except BaseException as err:
        reason = str(err) if isinstance(err, FedtuneError) else f"{type(err).__name__}: {err}"
        folder.update(status="failed", finished=_now(), reason=reason)
        raise
    folder.update(status="complete", finished=_now(), reason="")


@contextlib.contextmanager
def cancellable(remedy: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM (a scheduler's preemption) into CancelledError, once; `remedy` says how to go on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread handle signals
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise CancelledError(number, remedy)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
