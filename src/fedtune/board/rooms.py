"""What a submission keeps of each model: which clients must have samples of their own, and those of the curve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtune.board.samples import against
from fedtune.board.sets import client_rooms, samples
from fedtune.domains import TASKS
from fedtune.io import read_json, read_lines
from fedtune.methods import METHODS
from fedtune.results.entry import Entry
from fedtune.results.schema import Arm, Score
from fedtune.types import Problem

_CLIENT = re.compile(r"client-(\d{4,})")


def _personal(entry: Entry, arm: str) -> bool:
    """Tell whether each client has a model of its own in an arm."""
    kind = METHODS.get(entry.method)
    return arm == "local-only" or (arm == "federated" and kind is not None and kind.personalised)


def room_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield scores and samples of single clients that an arm should not have, and those that it lacks."""
    for arm in entry.arms:
        personal, where = _personal(entry, arm.name), folder / "evals" / arm.name
        if personal != bool(arm.per_client):
            kept = "has a model of its own" if personal else "has no model of its own"
            yield Problem(f"{arm.name}: per_client", f"each client {kept} in this arm")
        stray = where.glob("*.jsonl.gz") if personal else where.glob("client-*")
        for path in sorted(stray):
            yield Problem(str(path.relative_to(folder)), "belongs to no score")
        if wrong := arm.per_client.keys() ^ {f"{s.task}/{s.mode}" for s in arm.scores} if personal else set():
            yield Problem(f"{arm.name}: per_client", f"and the scores are not of the same tasks: {sorted(wrong)}")
        # with another main arm the clients' rows are not those of the entry
        if personal and entry.config["arm"] == "federated":
            yield from _clients(folder, entry, arm)


def _clients(folder: Path, entry: Entry, arm: Arm) -> Iterator[Problem]:
    """Yield clients with rows but without samples, and the other way round."""
    rows = dict(enumerate(entry.data["clients"]))
    found = {room: _CLIENT.fullmatch(room.rpartition("/")[2]) for room in client_rooms(folder, arm.name)}
    for room in sorted(room for room, name in found.items() if name is None or not rows.get(int(name[1]))):
        yield Problem(f"evals/{room}", "is of no client that has rows")
    have = {int(name[1]) for name in found.values() if name} | arm.failed.keys()
    missing = {client for client, n in rows.items() if n} - have
    trained = {c["client"] for line in read_lines(folder / "rounds.jsonl") for c in line["clients"]}
    # a client whose rows all have no label left is never asked
    masked = len(read_json(folder / "data.json")["masked_rows"])
    if missing & trained or sum(rows[client] for client in missing) > masked:
        yield Problem(
            f"evals/{arm.name}", f"has no samples of the clients {sorted(missing)[:10]}; the mean is over all"
        )


def curve_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield points of the curve that their round's own samples do not give."""
    path = folder / "curve.jsonl"
    lines = read_lines(path) if path.exists() else []
    every, limit = entry.config["eval"]["every"], entry.config["eval"]["max_error_rate"]
    seen = set()
    for line in lines:
        round_, score = line["round"], Score(**{k: v for k, v in line.items() if k != "round"})
        where, key = f"curve.jsonl: round {round_}, {score.task} ({score.mode})", (round_, score.task, score.mode)
        if not every or round_ % every or not 0 < round_ < entry.rounds or key in seen:
            yield Problem(where, "is there twice, or the settings do not evaluate it")
            continue
        seen.add(key)
        yield from (Problem(where, why) for why in _point(folder, entry, f"round-{round_:06d}", score, limit))


def _point(folder: Path, entry: Entry, room: str, score: Score, limit: float) -> Iterator[str]:
    if score.task not in TASKS:
        yield "is of no task that is known here"
        return
    mean = _personal(entry, "federated")
    rooms, last = ([*client_rooms(folder, name)] if mean else [name] for name in (room, "federated"))
    if len(rooms) != len(last):
        yield f"{len(rooms)} clients have samples, {len(last)} in the end"
        return
    yield from against(folder, rooms, score, limit, mean=mean)
    of_round, in_the_end = (_items(folder, names, score) for names in (rooms, last))
    if of_round != in_the_end:
        yield "its samples are not of the same items as those in the end"


def _items(folder: Path, rooms: Sequence[str], score: Score) -> list[list[tuple[Any, Any]]]:
    return [[(row["i"], row.get("gold")) for row in samples(folder, room, score.task, score.mode)] for room in rooms]
