"""Pack finished runs into a submission: what anybody needs to check them, and nothing else."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedtune import spaces
from fedtune.board import card
from fedtune.board.archive import ENTRY
from fedtune.board.entries import from_run
from fedtune.board.sets import named_logs
from fedtune.config.load import read_toml
from fedtune.io import file_sha256, write_bytes, write_json
from fedtune.results.entry import Entry
from fedtune.types import DataError

KEPT = ("manifest.json", "result.json", "rounds.jsonl", "data.json", "curve.jsonl")


def _without_path(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that do not say where this machine keeps its rows: nobody else has that folder."""
    data = settings.get("data", {})
    return {**settings, "data": {**data, "path": ""}} if data.get("path") else settings


def _copy(run: Path, out: Path, entry: Entry) -> None:
    write_bytes(out / "config.toml", tomli_w.dumps(_without_path(read_toml(run / "config.toml"))).encode())
    for name in KEPT:
        if (run / name).exists():
            shutil.copyfile(run / name, out / name)
    for path in sorted((run / "adapter").glob("*")):
        if path.suffix in (".json", ".safetensors"):
            (out / "adapter").mkdir(exist_ok=True)
            shutil.copyfile(path, out / "adapter" / path.name)
    for log in sorted(named_logs(run, entry.arms, entry.curve)):
        target = out / log.relative_to(run)
        # without a time stamp, so that the same log has the same hash
        if log.suffix == ".jsonl":
            write_bytes(target.with_name(f"{log.name}.gz"), gzip.compress(log.read_bytes(), mtime=0))
        elif log.exists():
            write_bytes(target, log.read_bytes())


def _packable(run: Path, team: str, title: str, link: str) -> Entry:
    """Return a run's entry, or refuse one that has no joint rounds or no folder by which it could be checked."""
    entry = from_run(run, team, title, link)
    if entry.settings.arm == "local-only":
        beside = "submit a federated run with the baseline beside it (fedtune run --arms local-only)"
        raise DataError(f"{run}: with arm = local-only each client trained alone, in no joint rounds; {beside}")
    if why := spaces.of(entry.settings).unsubmitted:
        raise DataError(f'{run}: peft.kind = "{entry.settings.peft.kind}"; {why}')
    return entry


def _pack_one(run: Path, out: Path, entry: Entry) -> Entry:
    """Pack one run into a folder of its own; return its entry with the files' hashes."""
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _copy(run, out, entry)
    card.write(out, entry)
    files = {str(p.relative_to(out)): file_sha256(p) for p in sorted(out.rglob("*")) if p.is_file()}
    entry = entry.model_copy(update={"files": files})
    write_json(out / ENTRY, entry.model_dump(mode="json"))
    return entry


def pack(runs: Sequence[Path], out: Path, team: str, title: str = "", link: str = "") -> list[Entry]:
    """Pack the seeds of one recipe, each into `seed-<n>`.

    Raises:
        DataError: a run is not complete or has no joint rounds, two have one seed, they are not of one recipe, or a
            folder is not empty.
        ValueError: a text with markup.
    """
    known = [_packable(run, team, title, link) for run in runs]
    if len({e.config_sha256 for e in known}) > 1:
        raise DataError("these runs are not of one recipe: they differ in more than the seed (fedtune compare RUN RUN)")
    seeds = [e.seed for e in known]
    if len(set(seeds)) < len(seeds):
        raise DataError(f"two runs have the same seed: {sorted(s for s in seeds if s is not None)}")
    return [_pack_one(run, out / f"seed-{e.seed}", e) for run, e in zip(runs, known, strict=True)]
