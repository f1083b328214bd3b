"""The same check for a submitter and for the board's own machine: every reason why a submission cannot be believed."""

from __future__ import annotations

import gzip
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from fedtune.board.entries import from_run, read_entry
from fedtune.board.samples import recomputed
from fedtune.board.wire import byte_problems
from fedtune.config import load, read_protocol
from fedtune.config.load import read_toml
from fedtune.io import file_sha256, read_json
from fedtune.models import zoo
from fedtune.models.source import WEIGHTS, not_a_number
from fedtune.results.entry import Entry
from fedtune.results.schema import Score
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


# what a submitter says freely; everything else must be what the files make
FREE = {"schema_version", "kind", "team", "title", "link", "state", "reasons", "claims", "files", "privacy"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _made(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield every field that is not what the packed run's own files make."""
    again = from_run(folder)
    for name in sorted(Entry.model_fields.keys() - FREE):
        said, made = getattr(entry, name), getattr(again, name)
        if said != made:
            yield Problem(f"entry.{name}", f"is {_short(said)}, the run's files make {_short(made)}")
    if entry.kind != "run" or entry.claims:
        yield Problem("entry.kind", "is of a run, and a run claims nothing beside its scores")
    if entry.privacy is not None:
        yield Problem("entry.privacy", "is claimed, the settings have no differential privacy")


def _settings(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield settings that are not the result's, and reasons against a rank that are not owned to."""
    settings = load([read_toml(folder / "config.toml")])
    config, known = settings.config, zoo.zoo().get(entry.base)
    if entry.config != config.semantic():
        yield Problem("entry.config", "is not what config.toml says")
    if entry.protocol_sha256 != read_protocol(config.protocol).hash:
        yield Problem("entry.protocol_sha256", f"is not that of the protocol {config.protocol}")
    for name, want in (("seed", config.seed), ("domain", config.domain), ("method", config.method.name)):
        if getattr(entry, name) != want:
            yield Problem(f"entry.{name}", f"is {getattr(entry, name)!r}, config.toml says {want!r}")
    pinned = {known.revision if known else "", config.model.revision} - {""}
    if pinned and entry.revision not in pinned:
        yield Problem(
            "entry.revision", f"is {entry.revision}, the base model is pinned at {' or '.join(sorted(pinned))}"
        )
    for reason in (*settings.unranked, *zoo.unranked_reasons(config)):
        if reason not in entry.unranked:
            yield Problem("config.toml", f"{reason}; the entry does not say that this makes it unranked")


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
    if spoilt := not_a_number(path / WEIGHTS):
        yield Problem(f"adapter/{WEIGHTS}", f"{spoilt} has NaN or infinity; no model can have been evaluated with it")
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


CHECKS = (_hashes, _settings, _made, _scores, _adapter, byte_problems)


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
