"""The same check for a submitter and for the board's own machine: every reason why a submission cannot be believed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedtune import domains
from fedtune.board.adapter import adapter_problems
from fedtune.board.archive import ENTRY, MAX_ENTRY, MAX_FILE, MAX_FILES, MAX_TEXT, MAX_TOTAL, is_clutter, opened
from fedtune.board.cohorts import round_problems
from fedtune.board.entries import from_run
from fedtune.board.log_size import MAX_LOG, logs_fit
from fedtune.board.logs import curve_problems, log_problems
from fedtune.board.samples import impossible, recomputed
from fedtune.board.store import holds, read_entry
from fedtune.board.traffic import byte_problems
from fedtune.config import read_protocol
from fedtune.config.load import read_toml
from fedtune.domains import TASKS
from fedtune.evaluation import again, scorers
from fedtune.io import file_sha256
from fedtune.models import zoo
from fedtune.results.bounds import as_reason
from fedtune.results.entry import Entry
from fedtune.settings import load
from fedtune.types import FedtuneError, Problem, ProblemsError

ALLOWED = (".json", ".jsonl", ".gz", ".toml", ".md", ".yaml", ".safetensors")


def _paths(folder: Path) -> list[Path]:
    """Return everything but files that a file manager left; a link is none, whatever its name."""

    def left(path: Path) -> bool:
        return is_clutter(path.relative_to(folder)) and path.is_file() and not path.is_symlink()

    return [p for p in sorted(folder.rglob("*")) if not left(p)]


def _layout(folder: Path) -> Iterator[Problem]:
    """Yield what must not be in a submission at all; nothing is opened here."""
    total, count = 0, 0
    for path in _paths(folder):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            yield Problem(name, "is a link; submit the file itself")
            continue
        if path.is_dir():
            continue
        if not path.is_file():
            yield Problem(name, "is neither a file nor a folder")
            continue
        size, count = path.stat().st_size, count + 1
        total += size
        most = MAX_FILE if path.suffix in (".gz", ".safetensors") else MAX_TEXT
        most = MAX_ENTRY if path.name in (ENTRY, "result.json") else most
        if size > most:
            yield Problem(name, f"{size:,} bytes, at most {most:,} are taken")
        if path.suffix not in ALLOWED:
            yield Problem(name, "is not a kind of file a submission has", f"only {', '.join(ALLOWED)}; never a pickle")
    if count > MAX_FILES:
        yield Problem(folder.name, f"{count} files, at most {MAX_FILES}")
    if total > MAX_TOTAL:
        yield Problem(folder.name, f"{total:,} bytes in all, at most {MAX_TOTAL:,}")


# what editors and version control make of a text: how to undo it, and what to tell
RETOLD: tuple[tuple[Callable[[bytes], bytes], str, str], ...] = (
    (lambda raw: raw.replace(b"\r\n", b"\n"), "its line ends were changed to CRLF", "in git: .gitattributes `* -text`"),
    (lambda raw: raw.removeprefix(b"\xef\xbb\xbf"), "a byte-order mark was put before it", "save it without one"),
)


def _changed(path: Path, wanted: str) -> tuple[str, str]:
    """Say how a file is another one than was listed, where that can be told, and what mends it."""
    raw = path.read_bytes() if path.stat().st_size < MAX_LOG else b""
    for back, how, fix in RETOLD:
        if (before := back(raw)) != raw and hashlib.sha256(before).hexdigest() == wanted:
            return f"is not the file that was listed: {how}", fix
    return "is not the file that was listed (sha256 differs)", ""


def _hashes(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield files that are missing, changed or not listed; what happened to all alike is said once."""
    there = {str(p.relative_to(folder)) for p in _paths(folder) if p.is_file()} - {ENTRY}
    for name in sorted(set(entry.files) - there):
        yield Problem(name, "is listed in entry.json but missing")
    for name in sorted(there - set(entry.files)):
        yield Problem(name, "is present but not listed in entry.json")
    retold: dict[tuple[str, str], list[str]] = {}
    for name in sorted(there & set(entry.files)):
        if file_sha256(folder / name) != entry.files[name]:
            what, fix = _changed(folder / name, entry.files[name])
            if not fix:
                yield Problem(name, what)
            retold.setdefault((what, fix), []).append(name)
    for (what, fix), names in retold.items():
        if fix:
            yield Problem(", ".join(names), what, fix)


# what a submitter says freely; everything else must be what the files make
FREE = {"schema_version", "kind", "team", "title", "link", "state", "reasons", "claims", "files", "privacy"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _made(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield every field that is not what the packed run's own files make."""
    made_again = from_run(folder)
    for name in sorted(Entry.model_fields.keys() - FREE):
        said, made = getattr(entry, name), getattr(made_again, name)
        if said != made:
            yield Problem(f"entry.{name}", f"is {_short(said)}, the run's files make {_short(made)}")
    if entry.kind != "run" or entry.claims:
        yield Problem("entry.kind", "is a run, which may claim nothing beside its scores")
    if entry.privacy is not None:
        yield Problem("entry.privacy", "is claimed, the settings have no differential privacy")


def _settings(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield settings that are not the result's, and undisclosed reasons for being unranked."""
    settings = load([read_toml(folder / "config.toml")], here=False)
    config, known = settings.config, zoo.zoo().get(entry.base)
    if entry.config != config.semantic():
        yield Problem("entry.config", "is not what config.toml says")
    if entry.protocol_sha256 != read_protocol(config.protocol).hash or entry.protocol != config.protocol:
        yield Problem("entry.protocol_sha256", f"is not that of the protocol {config.protocol}")
    said = {"seed": config.seed, "domain": config.domain, "method": config.method.name, "base": config.model.name}
    for name, want in said.items():
        if getattr(entry, name) != want:
            yield Problem(f"entry.{name}", f"is {getattr(entry, name)!r}, config.toml says {want!r}")
    pinned = {known.revision if known else "", config.model.revision} - {""}
    if pinned and entry.revision not in pinned:
        wanted = " or ".join(sorted(pinned))
        yield Problem("entry.revision", f"is {entry.revision}, the base model is pinned at {wanted}")
    # a folder of the submitter's machine is not one here: any reason that is about the base model will do
    of_model = [] if zoo.LOCAL in entry.unranked else zoo.unranked_reasons(config)
    for reason in (*settings.unranked, *domains.unranked_reasons(config), *of_model):
        if as_reason(reason) not in entry.unranked:
            yield Problem("config.toml", f"{reason}; the entry does not say that this makes it unranked")


def _evaluated(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield what the settings ask to be evaluated and an arm does not have."""
    config = load([read_toml(folder / "config.toml")], here=False).config
    tasks = domains.chosen_tasks(config)
    wanted: set[tuple[str, str]] = {(t.name, s.mode) for t in tasks for s in scorers.planned(t, config.eval)}
    for arm in entry.arms:
        have = Counter((s.task, s.mode) for s in arm.scores)
        for task, mode in sorted(wanted - have.keys()):
            yield Problem(f"{arm.name}/{task} ({mode})", "is missing, the settings evaluate it")
        for task, mode in sorted({pair for pair, times in have.items() if pair not in wanted or times > 1}):
            yield Problem(f"{arm.name}/{task} ({mode})", "is there twice, or the settings do not evaluate it")
    names = [arm.name for arm in entry.arms]
    for name in {*(["base"] if config.eval.base else []), config.arm} - set(names):
        yield Problem(name, "is missing, the settings evaluate it")
    for name in sorted(set(names) - {"base", "federated", "local-only", "centralised"}):
        yield Problem("entry.arms", f"{_short(name)} is neither the base model, the federated model nor a baseline")
    if len(set(names)) < len(names):
        yield Problem("entry.arms", "lists one model twice")


def _scores(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield scores that are impossible, or not what the samples give."""
    settings = load([read_toml(folder / "config.toml")], here=False).config.eval
    for arm in entry.arms:
        for score in arm.scores:
            where = f"{arm.name}/{score.title}"
            if not arm.per_client and (why := impossible(score)):
                yield Problem(where, why)
            for problem in recomputed(folder, arm, score, settings):
                yield Problem(where, problem)


OF_MODELS = (log_problems, _scores, curve_problems, adapter_problems)
CHECKS = (_hashes, _settings, _evaluated, _made, *OF_MODELS, round_problems, byte_problems)


def check_one(folder: Path) -> tuple[Entry | None, list[Problem]]:
    """Check one packed run; return its entry, where there is one, and every problem found."""
    if problems := list(_layout(folder)):
        return None, problems
    try:
        entry = read_entry(folder / ENTRY, MAX_ENTRY)
    except FedtuneError as err:
        return None, [Problem(ENTRY, str(err).replace(f"{folder}/", ""))]
    if problems := list(logs_fit(folder)):
        return entry, problems
    return entry, list(dict.fromkeys(problem for check in CHECKS for problem in _found(check, folder, entry)))


def _found(check: Callable[[Path, Entry], Iterable[Problem]], folder: Path, entry: Entry) -> list[Problem]:
    """Return what a check finds; that it cannot be made is a problem as well."""
    where = check.__name__.strip("_")
    try:
        return list(check(folder, entry))
    except ProblemsError as err:
        return list(err.problems)
    except FedtuneError as err:
        return [Problem(where, str(err).replace(f"{folder}/", ""))]
    # the files are a stranger's: whatever they make a check raise, they are not what a run writes
    except Exception as err:
        what = f"cannot be checked, a file is not what a run writes ({type(err).__name__}: {err})"
        return [Problem(where, " ".join(what.replace(f"{folder}/", "").split()))]


def not_run_again(entry: Entry) -> list[str]:
    """Return which scores stand on outcomes of programs that cannot be run again on this machine, and why."""
    tasks = {s.task: TASKS[s.task] for arm in entry.arms for s in arm.scores if s.task in TASKS}
    reasons = {name: scorers.one_of(task).not_run_again(task) for name, task in tasks.items()}
    return [f"{name}: {why}" for name, why in sorted(reasons.items()) if why]


def added(path: Path, store: Path) -> bool:
    """Tell whether a store has every packed run of a submission, of whatever form; the entries are read one by one."""
    with opened(path) as (packed, outside):
        there = [] if outside else [run / ENTRY for run in packed]
        if any(p.is_symlink() for p in there):
            return False
        try:
            return bool(there) and all(holds(store, read_entry(p, MAX_ENTRY)) for p in there)
        except FedtuneError:
            return False


def check(path: Path) -> list[tuple[str, Entry | None, list[Problem]]]:
    """Check a submission: a packed run, a folder of packed runs, or a zip of either.

    Returns:
        For each packed run its name, its entry and its problems; where none can be read, one line with the reasons.
    """
    with opened(path) as (packed, outside), again.one_submission():
        if outside or not packed:
            return [(path.name, None, outside)]
        found = [(p.name, *check_one(p)) for p in packed]
        return [(name, entry, problems + _duplicates(name, entry, found)) for name, entry, problems in found]


def _duplicates(name: str, entry: Entry | None, found: list[tuple[str, Entry | None, list[Problem]]]) -> list[Problem]:
    """Return which other packed run says the same seed, is of another recipe, or has the very same samples."""
    if entry is None:
        return []
    others = [(other, its) for other, its, _ in found if other != name and its]
    duplicates = [other for other, its in others if its.seed == entry.seed or entry.same_samples(its)]
    return [Problem(name, f"has the seed or the samples of {duplicates[0]}")] if duplicates else []
