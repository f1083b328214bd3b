"""The cohorts and answers of each round, compared with the settings and the clients' rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.schema import FederationSettings
from fedtune.io import read_json, read_lines
from fedtune.results.entry import Entry
from fedtune.types import Problem

ROUNDS = "rounds.jsonl"


def _row_problems(entry: Entry, federation: FederationSettings) -> Iterator[Problem]:
    """Yield how the clients' rows cannot be what the split of the settings gives."""
    rows = entry.data["clients"]
    if any(type(n) is not int or n < 0 for n in rows) or sum(rows) > entry.data["rows"]:
        yield Problem("entry.data", "its clients' rows are no counts, or more than there are")
    if len(rows) != federation.clients:
        yield Problem("entry.data", f"its rows are of {len(rows)} clients, the settings say {federation.clients}")
    # equal shards differ by the one row that is left over
    if entry.settings.data.partition == "iid" and max(rows, default=0) - min(rows, default=0) > 1:
        yield Problem("entry.data", "its clients' rows are no equal shards, as data.partition = iid makes them")


def _fewest(rows: Sequence[int], masked: int) -> int:
    """Return how many clients could be asked at least: one whose rows all have no label left never is."""
    able = sorted(n for n in rows if n)
    gone = 0
    while gone < len(able) - 1 and able[gone] <= masked:
        masked -= able[gone]
        gone += 1
    return len(able) - gone


def _one(line: dict[str, Any], federation: FederationSettings, rows: Sequence[int]) -> Iterator[str]:
    """Yield what one round cannot have been."""
    cohort, answered = line["cohort"], [c["client"] for c in line["clients"]]
    if any(type(line[name]) is not int or line[name] < 0 for name in ("bytes_up", "bytes_down")):
        yield "its bytes are no count"
    twice = len(set(cohort)) < len(cohort) or len(set(answered)) < len(answered)
    real = all(type(c) is int and 0 <= c < federation.clients for c in cohort)
    if twice or not real or not set(answered) <= set(cohort):
        yield "a client is there twice, or was not asked"
    elif without := [c for c in cohort if c >= len(rows) or not rows[c]]:
        yield f"the clients {without[:10]} were asked, and have no rows"
    if line["status"] not in ("ok", "skipped"):
        yield f"its status is {str(line['status'])[:20]!r}, neither ok nor skipped"
    if line["status"] == "ok" and len(answered) < federation.min_clients:
        yield f"{len(answered)} clients answered; without {federation.min_clients} a round is skipped"


def round_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield rounds that cannot have been as they are told: too few asked or answered, or clients without rows."""
    federation, rows = entry.settings.federation, entry.data["clients"]
    if entry.settings.arm != "federated":  # centralised training is one client with all rows
        federation = federation.model_copy(update={"clients": 1, "fraction": 1.0, "min_clients": 1})
    yield from _row_problems(entry, federation)
    lines: list[dict[str, Any]] = read_lines(folder / ROUNDS)
    for line in lines:
        yield from (Problem(ROUNDS, f"round {line['round']}: {why}") for why in _one(line, federation, rows))
    if not any(line["status"] == "ok" for line in lines):
        yield Problem(ROUNDS, "in no round did the model change")
    masked = len(set(read_json(folder / "data.json")["masked_rows"]))
    most = min(federation.cohort_size, sum(1 for n in rows if n))
    sizes = {len(line["cohort"]) for line in lines}
    # the same clients can be asked in every round
    if len(sizes) > 1 or not sizes <= {*range(min(most, _fewest(rows, masked)), most + 1)}:
        yield Problem(ROUNDS, f"{sorted(sizes)[:5]} clients were asked per round, the settings ask {most}")
