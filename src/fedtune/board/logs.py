"""What a submission keeps of each model: which clients must have samples of their own, and those of the curve."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedtune.board.archive import inside
from fedtune.board.samples import against
from fedtune.board.sets import client_subdirs, log_path, named_logs, samples
from fedtune.domains import TASKS
from fedtune.io import read_json, read_lines
from fedtune.methods import METHODS
from fedtune.results.entry import Entry
from fedtune.results.schema import Arm, Score
from fedtune.types import Problem


def _personal(entry: Entry, arm: str) -> bool:
    """Tell whether each client has a model of its own in an arm."""
    kind = METHODS.get(entry.method)
    return arm == "local-only" or (arm == "federated" and kind is not None and kind.models != "global")


def log_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield scores and samples of single clients that an arm should not have, and those that it lacks."""
    yield from _strays(folder, entry)
    for arm in entry.arms:
        personal = _personal(entry, arm.name)
        if personal != bool(arm.per_client):
            kept = "has a model of its own" if personal else "has no model of its own"
            yield Problem(f"{arm.name}: per_client", f"each client {kept} in this arm")
        if arm.failed and arm.name != "local-only":
            yield Problem(f"{arm.name}: failed", "only where each client trains alone can one be left without a model")
        if wrong := arm.per_client.keys() ^ {s.key for s in arm.scores} if personal else set():
            yield Problem(f"{arm.name}: per_client", f"and the scores are not of the same tasks: {sorted(wrong)}")
        # with another main arm the clients' rows are not those of the entry
        if personal and entry.settings.arm == "federated":
            yield from _clients(folder, entry, arm)


def _strays(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield files beside the logs that the scores and the curve stand on: nobody reads them, so they say nothing."""
    for path in sorted(set(inside(folder, "evals")) - named_logs(folder, entry.arms, entry.curve)):
        yield Problem(str(path.relative_to(folder)), "belongs to no score, client or round")


def _clients(folder: Path, entry: Entry, arm: Arm) -> Iterator[Problem]:
    """Yield clients with rows but without samples, and the other way round."""
    rows = dict(enumerate(entry.data["clients"]))
    have = {int(subdir.rpartition("-")[2]) for subdir in client_subdirs(folder, arm.name)}
    for client in sorted(client for client in have if not rows.get(client)):
        yield Problem(f"evals/{arm.name}/client-{client:04d}", "is of no client that has rows")
    if both := have & arm.failed.keys():
        yield Problem(f"{arm.name}: failed", f"the clients {sorted(both)[:10]} have samples")
    missing = {client for client, n in rows.items() if n} - have - arm.failed.keys()
    trained = {c["client"] for line in read_lines(folder / "rounds.jsonl") for c in line["clients"]}
    # a client whose rows all have no label left is never asked
    masked = len(set(read_json(folder / "data.json")["masked_rows"]))
    if missing & trained or sum(rows[client] for client in missing) > masked:
        yield Problem(
            f"evals/{arm.name}", f"has no samples of the clients {sorted(missing)[:10]}; the mean is over all"
        )


def curve_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield points of the curve that their round's own samples do not give."""
    path = folder / "curve.jsonl"
    lines = read_lines(path) if path.exists() else []
    every, seen = entry.settings.eval.every, set()
    # those in the end are read once, and not for each line; a hash of them is kept
    in_the_end = functools.cache(lambda task, mode: _items(folder, _subdirs(folder, entry, "federated"), task, mode))
    for line in lines:
        round_, score = line["round"], Score(**{k: v for k, v in line.items() if k != "round"})
        where, key = f"curve.jsonl: round {round_}, {score.title}", (round_, score.key)
        if not every or round_ % every or not 0 < round_ < entry.rounds or key in seen:
            yield Problem(where, "is there twice, or the settings do not evaluate it")
            continue
        seen.add(key)
        yield from (Problem(where, why) for why in _point(folder, entry, f"round-{round_:06d}", score, in_the_end))


def _subdirs(folder: Path, entry: Entry, name: str) -> list[str]:
    return client_subdirs(folder, name) if _personal(entry, "federated") else [name]


def _point(
    folder: Path, entry: Entry, subdir: str, score: Score, in_the_end: Callable[[str, str], str]
) -> Iterator[str]:
    if score.task not in TASKS:
        yield "is of no task that is known here"
        return
    mean, settings = _personal(entry, "federated"), entry.settings.eval
    subdirs, last = (_subdirs(folder, entry, name) for name in (subdir, "federated"))
    if len(subdirs) != len(last):
        yield f"{len(subdirs)} clients have samples, {len(last)} in the end"
        return
    yield from against(folder, subdirs, score, settings, mean=mean)
    # without samples of the round nothing is to be compared
    if not any(log_path(folder, name, score.task, score.mode).exists() for name in subdirs):
        return
    if _items(folder, subdirs, score.task, score.mode) != in_the_end(score.task, score.mode):
        yield "its samples are not of the same items as those in the end"


def _items(folder: Path, subdirs: Sequence[str], task: str, mode: str) -> str:
    """Return a hash of the places and right answers in the logs of each subdir."""
    made = hashlib.sha256()
    for subdir in subdirs:  # one log in memory at a time
        found = [(row["i"], row.get("gold")) for row in samples(folder, subdir, task, mode)]
        made.update(hashlib.sha256(repr(found).encode()).digest())
    return made.hexdigest()
