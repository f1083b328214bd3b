"""The same check for a submitter and for the board's own machine: every reason why a submission cannot be believed."""

from __future__ import annotations

import gzip
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from fedtune.board.entries import read_entry, recipe_hash
from fedtune.board.samples import recomputed
from fedtune.board.wire import byte_problems
from fedtune.config import load, read_protocol
from fedtune.config.load import read_toml
from fedtune.io import file_sha256, read_json, tensor_header
from fedtune.results.entry import Entry
from fedtune.results.schema import Result, Score
from fedtune.types import FedtuneError, Problem

MAX_FILES, MAX_FILE, MAX_TOTAL = 2_000, 512 * 1024**2, 1024**3
MAX_LOG = 256 * 1024**2
ALLOWED = (".json", ".jsonl", ".gz", ".toml", ".md", ".yaml", ".safetensors")
ENTRY = "entry.json"


def _layout(folder: Path) -> Iterator[Problem]:
    """Yield what must not be in a submission at all; nothing is opened here."""
    total, count = 0, 0
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            yield Problem(name, "is a link; submit the file itself")
            continue
        if not path.is_file():
            continue
        size, count = path.stat().st_size, count + 1
        total += size
        if size > MAX_FILE:
            yield Problem(name, f"{size:,} bytes, at most {MAX_FILE:,} are taken")
        if path.suffix not in ALLOWED:
            yield Problem(name, "is not a kind of file a submission has", f"only {', '.join(ALLOWED)}; never a pickle")
    if count > MAX_FILES:
        yield Problem(str(folder), f"{count} files, at most {MAX_FILES}")
    if total > MAX_TOTAL:
        yield Problem(str(folder), f"{total:,} bytes in all, at most {MAX_TOTAL:,}")


def _hashes(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield files that are missing, changed or not listed."""
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {ENTRY}
    for name in sorted(set(entry.files) - there):
        yield Problem(name, "is listed and not there")
    for name in sorted(there - set(entry.files)):
        yield Problem(name, "is there and not listed")
    for name in sorted(there & set(entry.files)):
        if file_sha256(folder / name) != entry.files[name]:
            yield Problem(name, "is not the file that was listed (sha256 differs)")


def _same(problem: str, got: Any, want: Any) -> Iterator[Problem]:
    if got != want:
        yield Problem(problem, f"is {got!r}, the run's files say {want!r}")


def _settings(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield settings that do not belong to the entry, or that the protocol locks."""
    settings = load([read_toml(folder / "config.toml")])
    config = settings.config
    yield from _same("entry.config", entry.config, config.semantic())
    yield from _same("entry.config_sha256", entry.config_sha256, recipe_hash(folder / "config.toml"))
    yield from _same("entry.protocol_sha256", entry.protocol_sha256, read_protocol(config.protocol).hash)
    for name in ("domain", "protocol", "seed"):
        yield from _same(f"entry.{name}", getattr(entry, name), getattr(config, name))
    yield from _same("entry.method", entry.method, config.method.name)
    for reason in settings.unranked:
        if reason not in entry.unranked:
            yield Problem("config.toml", f"{reason}; the entry does not say that this makes it unranked")


def _result(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield what the entry says otherwise than the run's own result."""
    result = Result.model_validate(read_json(folder / "result.json"))
    yield from _same("entry.arms", entry.arms, result.arms)
    for name in ("rounds", "lost_clients", "skipped_rounds", "unranked", "revision"):
        yield from _same(f"entry.{name}", getattr(entry, name), getattr(result, name))
    yield from _same("entry.base", entry.base, result.model)
    yield from _same("entry.costs.bytes_up", entry.costs.bytes_up, result.bytes_up)
    yield from _same("entry.costs.bytes_down", entry.costs.bytes_down, result.bytes_down)


def impossible(score: Score) -> str:
    """Say why a score cannot have come from n items, or return an empty string."""
    if score.metric != "accuracy" or score.score is None:
        return ""
    if not 0 <= score.score <= 1:
        return f"{score.score} is not between 0 and 1"
    hits = score.score * score.n
    if not math.isclose(hits, round(hits), abs_tol=1e-6 * max(1, score.n)):
        return f"{score.score:.6g} is not k/{score.n} for any whole k"
    return ""


def _scores(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield scores that are impossible, or not what the samples give."""
    for arm in entry.arms:
        for score in arm.scores:
            where = f"{arm.name}/{score.task} ({score.mode})"
            if not arm.per_client and (why := impossible(score)):
                yield Problem(where, why)
            for problem in recomputed(folder, arm, score):
                yield Problem(where, problem)


def _adapter(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield what shows that the adapter was made for another model, or is none."""
    path = folder / "adapter"
    if not path.exists():
        return
    tensor_header(path / "adapter_model.safetensors")
    config = read_json(path / "adapter_config.json")
    made_for = str(config.get("base_model_name_or_path", ""))
    if made_for != entry.base and Path(made_for).name != Path(entry.base).name:
        yield Problem("adapter/adapter_config.json", f"was made for {made_for!r}, the entry says {entry.base!r}")


def _logs_fit(folder: Path) -> Iterator[Problem]:
    """Yield logs that unpack to more than a log may be, without unpacking them."""
    for path in folder.rglob("*.gz"):
        size = 0
        with gzip.open(path) as file:
            while chunk := file.read(1 << 20):
                size += len(chunk)
                if size > MAX_LOG:
                    yield Problem(str(path.relative_to(folder)), f"unpacks to more than {MAX_LOG:,} bytes")
                    break


CHECKS = (_hashes, _settings, _result, _scores, _adapter, byte_problems)


def check_one(folder: Path) -> tuple[Entry | None, list[Problem]]:
    """Check one packed run; return its entry, where there is one, and every problem found."""
    problems = list(_layout(folder))
    if problems:
        return None, problems
    try:
        entry = read_entry(folder / ENTRY)
        problems += _logs_fit(folder)
    except (FedtuneError, OSError) as err:
        return None, [Problem(ENTRY, str(err))]
    if problems:
        return entry, problems
    for check in CHECKS:
        try:
            problems += check(folder, entry)
        except (FedtuneError, OSError, KeyError, TypeError, ValueError) as err:
            problems.append(Problem(check.__name__.strip("_"), f"{type(err).__name__}: {err}".splitlines()[0]))
    return entry, problems


def _unzipped(archive: Path, folder: Path) -> Iterator[Problem]:
    """Unpack an archive, or yield why it is not: names that lead outside, links, or too much."""
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
        for info in infos:
            path = PurePosixPath(info.filename)
            if path.is_absolute() or ".." in path.parts or "\\" in info.filename or (info.external_attr >> 28) == 0xA:
                yield Problem(info.filename, "leads outside the archive, or is a link")
        if len(infos) > MAX_FILES or sum(i.file_size for i in infos) > MAX_TOTAL:
            yield Problem(archive.name, f"unpacks to more than {MAX_FILES} files or {MAX_TOTAL:,} bytes")
            return
        safe = all(not PurePosixPath(i.filename).is_absolute() and ".." not in i.filename for i in infos)
        if safe:
            file.extractall(folder)


def check(path: Path) -> list[tuple[str, Entry | None, list[Problem]]]:
    """Check a submission: a packed run, a folder of packed runs, or a zip of either.

    Returns:
        For each packed run its name, its entry and its problems.
    """
    if path.is_file():
        with TemporaryDirectory() as scratch:
            try:
                problems = list(_unzipped(path, Path(scratch)))
            except (zipfile.BadZipFile, OSError) as err:
                problems = [Problem(path.name, f"is not a zip archive: {err}")]
            return [(path.name, None, problems)] if problems else check(Path(scratch))
    packed = [path] if (path / ENTRY).exists() else sorted(p.parent for p in path.glob(f"*/{ENTRY}"))
    if not packed:
        return [(str(path), None, [Problem(str(path), f"has no {ENTRY}", "pack a run: fedtune submit RUN --out DIR")])]
    found = [(p.name, *check_one(p)) for p in packed]
    return [(name, entry, problems + _twins(name, entry, found)) for name, entry, problems in found]


def _twins(name: str, entry: Entry | None, found: list[tuple[str, Entry | None, list[Problem]]]) -> list[Problem]:
    """Return which other packed run says the same seed, or has the very same samples."""
    if entry is None:
        return []
    logs = {k: v for k, v in entry.files.items() if k.startswith("evals/federated")}
    twins = [
        other
        for other, its, _ in found
        if other != name and its and (its.seed == entry.seed or (logs and logs == {k: its.files.get(k) for k in logs}))
    ]
    return [Problem(name, f"has the seed or the samples of {twins[0]}")] if twins else []
