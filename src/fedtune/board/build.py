"""From the store of entries to `board.json`: rows, ranks with ties, and what the page needs to compare them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtune import __version__, spaces
from fedtune.board import pairs as pairs_of
from fedtune.board.store import left_out_line, readable
from fedtune.config import Config
from fedtune.evaluation import scorers
from fedtune.io import canonical, digest
from fedtune.methods import METHODS
from fedtune.results.entry import Entry, unpacked
from fedtune.results.schema import Score
from fedtune.types import DataError

BOARD_VERSION = 1
SIZES = ((1_000, "under 1 B"), (4_000, "1 to 4 B"), (10_000, "4 to 10 B"), (math.inf, "over 10 B"))
BUDGET = 200_000 * 1024**2  # FlowerTune's limit: 200,000 MiB over all rounds, both directions
# the seeds of one recipe, the smallest first: entries that differ in nothing else
Recipe = Sequence[Entry]


def recipes(entries: Iterable[Entry]) -> list[Recipe]:
    """Group entries by recipe, in the order they come. Raises DataError: two entries of one recipe and seed."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((*entry.place().parts[:-1], entry.team), []).append(entry)
    for place, found in groups.items():
        seeds = [e.seed for e in found]
        if len(set(seeds)) < len(seeds):
            raise DataError(f"{'/'.join(place)}: seed {max(seeds, key=seeds.count)} is there more than once")
    return [sorted(found, key=lambda e: e.seed or 0) for found in groups.values()]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _wilson(score: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion over n items (closed form: a thousand rows take no time)."""
    z = 1.959963984540054
    centre, spread = score + z * z / (2 * n), z * math.sqrt(score * (1 - score) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def _task(recipe: Recipe, score: Score) -> dict[str, Any]:
    """Return a task's numbers over all seeds of a recipe."""
    same = [e.main.like(score) for e in recipe]
    base = [arm.like(score) if (arm := e.arm("base")) else None for e in recipe]
    mean = _mean([s.score if s else None for s in same])
    seeds = [s.score for s in same if s and s.score is not None]
    known = mean is not None and scorers.metric(score.metric).hits and score.n
    low, high = _wilson(mean, score.n) if known and mean is not None else (score.interval or (None, None))
    return {
        "task": score.task,
        "mode": score.mode,
        "metric": score.metric,
        "averaged": scorers.metric(score.metric).averaged,
        "n": score.n,
        "score": mean,
        "low": low,
        "high": high,
        "seeds": seeds,
        "spread": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
        "strict": _mean([s.strict if s else None for s in same]),
        "valid": _mean([s.valid_rate if s else None for s in same]),
        "base": _mean([s.score if s else None for s in base]),
        "chance": score.trivial.get("majority"),
        "claimed": recipe[0].claims.get(score.task),
        "clients": recipe[0].main.of_clients(score),
        **_bits(recipe, score),
    }


def _bits(recipe: Recipe, score: Score) -> dict[str, Any]:
    """Return which items each seed had right, and of what items, for paired tests here and in the page.

    The bits are None where a seed does not say, or is of other items than the first one.
    """
    known = [e.answers.get(f"{e.main.name}/{score.key}") for e in recipe]
    items = known[0].items_sha256 if known[0] else score.items_sha256
    same = [a.bits for a in known if a and a.n == score.n and a.items_sha256 == items]
    return {"items": items, "bits": same if len(same) == len(known) else None}


def _size(millions: float | None) -> str:
    return "unknown" if millions is None else next(name for limit, name in SIZES if millions < limit)


def _average(tasks: Sequence[dict[str, Any]], mode: str, key: str = "score") -> float | None:
    return _mean([t[key] for t in tasks if t["mode"] == mode and t["averaged"]])


def remarks(recipe: Recipe) -> list[str]:
    """Return what a reader should know of a row's seeds: who chose them, and what one of them cannot tell."""
    seeds = [e.seed for e in recipe if e.seed is not None]
    if not seeds:
        return []
    chosen = [] if seeds == list(range(1, len(seeds) + 1)) else ["its maker chose the seeds; asked for are 1, 2, 3"]
    few = [f"{len(seeds)} of 3 seeds: how much another would differ is not known"] if len(seeds) < 3 else []
    return few + chosen


def _factored(config: Config) -> bool:
    return config.peft.kind in spaces.SPACES and spaces.of(config).factored


def row(recipe: Recipe) -> dict[str, Any]:
    """Return one line of the board."""
    entry, costs = recipe[0], [e.costs for e in recipe]
    settings = entry.settings_or_none
    tasks = [_task(recipe, s) for s in entry.main.scores]
    total = _mean([float(c.bytes_up + c.bytes_down) or None for c in costs])
    modes = sorted({t["mode"] for t in tasks})
    return {
        "id": digest([*entry.place().parts[:-1], entry.team])[:12],
        "kind": entry.kind,
        "domain": entry.domain,
        "team": entry.team,
        "title": entry.title,
        "link": entry.link,
        "state": _worst_state(recipe),
        "reasons": sorted({r for e in recipe for r in e.reasons}),
        "unranked": sorted({r for e in recipe for r in e.unranked}),
        "remarks": remarks(recipe),
        "base": entry.base,
        "revision": entry.revision,
        "millions": entry.base_millions,
        "size": _size(entry.base_millions),
        "method": entry.method,
        "paper": METHODS[entry.method].paper if entry.method in METHODS else "",
        "rank_r": settings.lora.r if settings and _factored(settings) else None,
        "dora": settings is not None and settings.lora.dora,
        "partition": settings.data.partition if settings else "unknown",
        "protocol": entry.protocol or "unknown",
        "privacy": entry.privacy.model_dump() if entry.privacy else None,
        "seeds": [e.seed for e in recipe if e.seed is not None],
        "rounds": entry.rounds,
        "lost": sum(e.lost_clients for e in recipe),
        "config": entry.config_sha256,
        "commit": entry.code.get("commit"),
        "dirty": entry.code.get("dirty"),
        "tasks": tasks,
        "scores": {mode: _average(tasks, mode) for mode in modes},
        "strict": {mode: _average(tasks, mode, "strict") for mode in modes},
        "valid": {mode: _average(tasks, mode, "valid") for mode in modes},
        "bytes": total,
        "budget": "unknown" if not total else "within 200 GB" if total <= BUDGET else "over 200 GB",
        "seconds": _mean([c.wall_seconds for c in costs]),
        "peak": _mean([float(c.peak_memory_bytes) if c.peak_memory_bytes else None for c in costs]),
        "energy": _mean([c.energy_joules for c in costs]),
        "trainable": entry.costs.trainable_parameters,
        "adapter": entry.costs.adapter_bytes,
        "curve": [p.model_dump() for p in entry.curve],
        "losses": entry.losses,
    }


def _worst_state(recipe: Recipe) -> str:
    order = ("flagged", "reported", "re-scored", "re-run")
    return min((e.state for e in recipe), key=order.index)


def _flags(task: dict[str, Any]) -> np.ndarray:
    """Return which items each seed had right, (seeds x items)."""
    return np.stack([unpacked(bits, task["n"]) for bits in task["bits"]])


def separable(one: dict[str, Any], two: dict[str, Any], mode: str) -> bool:
    """Tell whether two rows' averages differ at 95 %, over all their seeds.

    Item by item (paired bootstrap over items and seeds) where both have their samples of the same items in all tasks;
    by their intervals' overlap in quadrature elsewhere.
    """
    tasks = {t["task"]: t for t in two["tasks"] if t["mode"] == mode}
    pairs = [(t, tasks[t["task"]]) for t in one["tasks"] if t["mode"] == mode and t["task"] in tasks]
    same = [(a, b) for a, b in pairs if a["bits"] and b["bits"] and a["items"] == b["items"] and a["n"] == b["n"]]
    if same and len(same) == len(pairs):
        return pairs_of.p_value([(_flags(a), _flags(b)) for a, b in same]) < pairs_of.LEVEL
    return _apart(one, two, mode)


def _half(row_: dict[str, Any], mode: str) -> float | None:
    """Return half the width of a row's 95 % interval, its tasks being independent."""
    known = [t for t in row_["tasks"] if t["mode"] == mode and t["low"] is not None]
    return math.sqrt(sum(((t["high"] - t["low"]) / 2) ** 2 for t in known)) / len(known) if known else None


def _apart(one: dict[str, Any], two: dict[str, Any], mode: str) -> bool:
    first, second = _half(one, mode), _half(two, mode)
    if first is None or second is None:
        return False
    return bool(abs(one["scores"][mode] - two["scores"][mode]) > math.hypot(first, second))


def ranked(rows: Sequence[dict[str, Any]], domain: str, mode: str) -> dict[str, int]:
    """Return rank by row id on one board: rows that cannot be told from the best of their group share its rank.

    Held against the group's best and not against the row above: a chain of small steps would else tie all. Flagged and
    unranked rows, and rows without a score, have none.
    """
    able = [
        r
        for r in rows
        if r["domain"] == domain and r["scores"].get(mode) is not None and r["state"] != "flagged" and not r["unranked"]
    ]
    able.sort(key=lambda r: (-r["scores"][mode], r["id"]))
    ranks: dict[str, int] = {}
    best: dict[str, Any] | None = None
    for place, this in enumerate(able):
        if best is None or separable(best, this, mode):
            best = this
            ranks[this["id"]] = place + 1
        else:
            ranks[this["id"]] = ranks[best["id"]]
    return ranks


def board(store: Path) -> dict[str, Any]:
    """Return everything the page shows; what no page can show is left out, and `left_out` says what and why.

    Raises:
        DataError: no such folder.
    """
    if not store.is_dir():
        raise DataError(f"{store}: no such folder; make one and add a submission (fedtune board add --help)")
    left_out: list[str] = []
    entries: list[Entry] = []
    rows: list[dict[str, Any]] = []
    for recipe in recipes(entry for _, entry in readable(store, left_out)):
        # the files come from strangers' submissions: no one of them may keep all others off the page
        try:
            made = row(recipe)
            canonical(made).encode()
        except Exception as err:
            left_out.append(left_out_line(recipe[0].place().parent, err))
            continue
        entries += recipe
        rows.append(made)
    domains = sorted({r["domain"] for r in rows})
    modes = sorted({mode for r in rows for mode in r["scores"]})
    ranks = {f"{d}/{m}": ranked(rows, d, m) for d in domains for m in modes}
    return {
        "schema_version": BOARD_VERSION,
        "made_by": f"fedtune {__version__}",
        "store_sha256": digest([e.model_dump(mode="json") for e in entries]),
        "entries": len(entries),
        "left_out": left_out,
        "domains": domains,
        "modes": modes,
        "rows": rows,
        "ranks": {key: table for key, table in ranks.items() if table},
    }
