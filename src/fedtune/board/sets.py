"""Whether a run was evaluated on all of the benchmark's sets, and on the whole of each; else it has no rank."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtune.data.files import parse_rows, read_text_file
from fedtune.domains import DOMAINS, TASKS
from fedtune.evaluation import known, scorers
from fedtune.io import canonical, reading
from fedtune.results.entry import Point
from fedtune.results.schema import PATH_PART, Arm, Score
from fedtune.types import CorruptFileError


def _inside(folder: Path, *parts: str) -> Path:
    """Return a path below the folder of a run's logs, of names that lead nowhere else; else raise CorruptFileError."""
    if wrong := [part for part in parts if not re.fullmatch(PATH_PART, part)]:
        raise CorruptFileError(
            f"{folder}: {wrong[0][:100]!r} is no name of an arm, a task or a mode; no log is read by it"
        )
    return folder.joinpath("evals", *parts)


def client_subdirs(folder: Path, arm: str) -> list[str]:
    """Return the parts of an arm's logs, one for each client, where each has a model of its own; in their order.

    Raises:
        CorruptFileError: the arm's name could lead out of the folder.
    """
    numbers = {int(p.name[7:]) for p in _inside(folder, arm).glob("client-*") if p.name[7:].isdecimal()}
    subdirs = [f"{arm}/client-{number:04d}" for number in sorted(numbers)]
    # a client's number is spelled in one way only; any other spelling is no client's
    return [subdir for subdir in subdirs if (folder / "evals" / subdir).exists()]


def subdirs_of(folder: Path, arm: Arm) -> list[str]:
    """Return the parts of an arm's logs: one for each client where each has a model of its own, else the arm's."""
    return client_subdirs(folder, arm.name) if arm.per_client else [arm.name]


def log_path(folder: Path, subdir: str, task: str, mode: str) -> Path:
    """Return where an arm's or one client's samples of a task are, in a run folder or a packed one; there may be none.

    Raises:
        CorruptFileError: there are two logs of it, so that nobody can tell which one counts; or a name could lead out
            of the folder.
    """
    plain = _inside(folder, *subdir.split("/"), f"{task}.{mode}.jsonl")
    packed = plain.with_name(f"{plain.name}.gz")
    if plain.exists() and packed.exists():
        raise CorruptFileError(f"{plain}: stands beside {packed.name}; one log of an evaluation is wanted, remove one")
    return plain if plain.exists() else packed


def named_logs(folder: Path, arms: Sequence[Arm], curve: Sequence[Point]) -> set[Path]:
    """Return what `log_path` gives for every score, client and round of the curve; any other log is a stray."""
    named = [(arm.name, score.task, score.mode, bool(arm.per_client)) for arm in arms for score in arm.scores]
    each = any(arm.per_client for arm in arms if arm.name == "federated")
    named += [(f"round-{p.round:06d}", p.task, p.mode, each) for p in curve]
    return {
        log_path(folder, subdir, task, mode)
        for where, task, mode, personal in named
        for subdir in (client_subdirs(folder, where) if personal else [where])
    }


def samples(run: Path, subdir: str, task: str, mode: str) -> list[dict[str, Any]]:
    """Return the samples in the log at `log_path`; none where there is no log. Raises CorruptFileError."""
    path = log_path(run, subdir, task, mode)
    return parse_rows(read_text_file(path), str(path.relative_to(run)))[1:] if path.exists() else []


def missing_tasks(domain: str, scores: Sequence[Score]) -> Iterator[str]:
    """Yield, for each evaluation, which of the domain's benchmark sets a list of scores lacks."""
    wanted = [t.name for t in DOMAINS[domain].tasks] if domain in DOMAINS else []
    for mode in sorted({s.mode for s in scores if scorers.metric(s.metric).averaged}):
        lacking = [name for name in wanted if name not in {s.task for s in scores if s.mode == mode}]
        if lacking:
            yield f"{mode}: not evaluated on {', '.join(lacking)}"


MOST = 500  # letters of a reason that an entry keeps
# what of a sample is the model's own, and not how it was judged or written down
ANSWERED = ("i", "gold", "scores", "value", "output", "programs")


def _fingerprint(run: Path, subdirs: Sequence[str], score: Score, losses: Sequence[float | None]) -> str:
    """Return what `digest` gives of the rows of all subdirs, with one log in memory at a time; none without rows."""
    scorer = scorers.find(TASKS[score.task], score.mode) if score.task in TASKS else None
    alone, some = scorer is not None and scorer.distinct, False
    made = hashlib.sha256(b"[" if alone else b"[[")
    for number, subdir in enumerate(subdirs):
        rows = [[row.get(key) for key in ANSWERED] for row in samples(run, subdir, score.task, score.mode)]
        made.update((("," if number else "") + canonical(rows)).encode("utf-8", "surrogatepass"))
        some = some or bool(rows)
    made.update(b"]" if alone else f"],{canonical(list(losses))}]".encode())
    return made.hexdigest() if some else ""


def fingerprints(run: Path, arm: Arm, losses: Sequence[float | None]) -> dict[str, str]:
    """Return a hash of what an arm's models answered, by task and mode; however the logs are packed, it is the same.

    Two seeds never have the same likelihoods of a whole set, but may well give the same texts: those are hashed
    together with the losses.

    Raises:
        CorruptFileError: a damaged log.
    """
    found = {}
    for score in arm.scores:
        with reading(run / "evals" / arm.name / f"{score.task}.{score.mode}.jsonl"):  # a number may be infinite
            made = _fingerprint(run, subdirs_of(run, arm), score, losses)
        if made:
            found[score.key] = made
    return found


def reasons(run: Path, domain: str, arms: Sequence[Arm]) -> Iterator[str]:
    """Yield why the scores of the ranked arm, or of the base model beside it, are not those of the domain's whole sets.

    The ranked arm is the first; only that one must have all tasks. Raises CorruptFileError.
    """
    yield from missing_tasks(domain, arms[0].scores)
    ranked, *others = ([*_of_part(run, arm)] for arm in arms)
    yield from ranked
    yield from (f"base model: {why}" for other in others for why in other if why not in ranked)
    for score in (score for arm in arms[1:] for score in arm.scores if score.score is None):
        yield f"base model: {score.title}: has no score: {score.withheld or 'unknown'}"[:MOST]


def _of_part(run: Path, arm: Arm) -> Iterator[str]:
    """Yield which of an arm's scores are of a part of a set, or of another."""
    subdirs = subdirs_of(run, arm)
    for score in arm.scores:
        task = TASKS.get(score.task)
        if score.score is None or task is None:
            continue
        logs = (samples(run, subdir, score.task, score.mode) for subdir in subdirs)
        key = scorers.one_of(task).key
        found = {why for rows in logs if (why := known.shortfall(task.name, score.mode, key, task.n, rows))}
        yield from (f"{score.title}: {why}" for why in sorted(found))
