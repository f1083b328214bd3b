"""Several runs by one command: every combination of domains, methods, seeds and settings, and what came of them.

Runs that share a base model and an adapter's shape share one model in memory, and are one cohort where the plan trains
clients together. A run that is complete is not done again, and one that was cut off goes on.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.config import Config, Settings
from fedtune.experiment.folder import MANIFEST, RESULT, cancellable
from fedtune.experiment.report import Reporter
from fedtune.experiment.resident import Resident
from fedtune.experiment.run import run
from fedtune.io import digest, read_json, write_json
from fedtune.results import schema
from fedtune.results.stats import student
from fedtune.training import workload
from fedtune.types import FedtuneError, RunFailedError

SUMMARY = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its settings, where they differ from the others', and its folder."""

    settings: Settings
    where: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


def points(axes: Mapping[str, Sequence[Any]], build: Callable[[Mapping[str, Any]], Settings], out: Path) -> list[Point]:
    """Return every combination of the axes' values, validated.

    Args:
        axes: setting (a dotted key) -> values.
        build: turns one value of each axis into settings.
        out: the sweep's folder.
    """
    found = []
    for values in itertools.product(*axes.values()):
        where = dict(zip(axes, values, strict=True))
        text = "-".join(str(v) for v in values)
        readable = "".join(c if c.isalnum() or c in "-._" else "_" for c in text)[:80]
        settings = build(where)
        found.append(Point(settings, where, out / f"{readable}-{digest(where)[:6]}"))
    return found


def _state(point: Point) -> str:
    path = point.folder / MANIFEST
    return str(read_json(path).get("status")) if path.exists() else "new"


def groups(chosen: Sequence[Point]) -> list[list[Point]]:
    """Return the points by what they can share: base model, adapter and engine."""
    shared: dict[str, list[Point]] = {}
    for point in chosen:
        plain = point.settings.config.plain()
        shared.setdefault(digest([plain[key] for key in ("model", "lora", "engine")]), []).append(point)
    return list(shared.values())


class _Watch(Reporter):
    """Passes on what one run of a sweep says, under its name, and ends the run where the sweep is ending."""

    def __init__(self, inner: Reporter, name: str, resident: Resident) -> None:
        self._inner, self._name, self._resident = inner, name, resident

    def _look(self) -> None:
        stopping = self._resident.crew.stopping
        if stopping is not None:
            raise stopping

    def note(self, text: str) -> None:
        self._inner.note(f"{self._name}: {text}")

    def step(self, client: int, tokens: int, loss: float) -> None:
        self._look()

    def round(self, record: Any) -> None:
        losses = [c.loss for c in record.clients if c.loss is not None]
        shown = f", loss {statistics.fmean(losses):.4f}" if losses else ""
        self._inner.note(f"{self._name}: round {record.round} {record.status}{shown}")

    def evaluating(self, what: str, done: int, total: int) -> None:
        self._look()


def _one(point: Point, resident: Resident, watch: Reporter) -> str:
    """Do one run; a fault of its own ends it alone."""
    reporter = _Watch(watch, point.name, resident)
    try:
        run(point.settings, point.folder, resume=_state(point) != "new", reporter=reporter, resident=resident)
    except FedtuneError as err:
        watch.note(f"{point.name}: failed: {err}")
        return f"{type(err).__name__}: {err}"
    return ""


def _longest(configs: Sequence[Config], resident: Resident) -> workload.EncodedShards:
    """Return the shards with the longest text of all runs: what fits must fit for each."""
    different = {digest([c.domain, c.semantic()["data"], c.plain()["prompt"], c.train.max_length]): c for c in configs}
    found = [workload.encode_shards(workload.load(c), resident.base.tokenizer, c) for c in different.values()]
    return max(found, key=lambda shards: shards.longest)


def _group(chosen: Sequence[Point], watch: Reporter) -> dict[str, str]:
    """Do the runs that share a model: as many at a time as one pass trains."""
    first = chosen[0].settings.config
    resident = Resident.of(first, [p.settings.config.seed for p in chosen])
    how = resident.planned(first, _longest([p.settings.config for p in chosen], resident))
    watch.note(f"{len(chosen)} runs on {first.model.name}: {how.line()}")
    faults: dict[str, str] = {}
    try:
        for start in range(0, len(chosen), resident.crew.size):
            some = chosen[start : start + resident.crew.size]
            ended = resident.crew.together([partial(_one, point, resident, watch) for point in some])
            faults |= {p.name: fault for p, fault in zip(some, ended, strict=True) if fault}
    finally:
        resident.end()
    return faults


def sweep(chosen: Sequence[Point], out: Path, reporter: Reporter | None = None) -> list[dict[str, Any]]:
    """Do all runs that are not complete, and summarise all.

    Returns:
        The rows of the summary, which is also written to `sweep.json`.

    Raises:
        RunFailedError: some runs failed; the others are done, and the summary says which.
        CancelledError: Ctrl-C or SIGTERM; the same command goes on.
    """
    watch = reporter or Reporter()
    waiting = [p for p in chosen if _state(p) != "complete"]
    if len(waiting) < len(chosen):
        watch.note(f"{len(chosen) - len(waiting)} of {len(chosen)} runs are complete already")
    faults: dict[str, str] = {}
    with cancellable():
        for group in groups(waiting):
            faults |= _group(group, watch)
    rows = summary([p for p in chosen if p.name not in faults])
    write_json(out / SUMMARY, {"rows": rows, "failed": faults})
    if faults:
        listed = "".join(f"\n  {name}: {why}" for name, why in faults.items())
        raise RunFailedError(f"{len(faults)} of {len(chosen)} runs failed:{listed}")
    return rows


def summary(chosen: Sequence[Point]) -> list[dict[str, Any]]:
    """Return one row for each combination but for seeds: each score's mean over them, with its 95 % interval."""
    together: dict[str, list[Point]] = {}
    for point in chosen:
        rest = {k: v for k, v in point.where.items() if k != "seed"}
        together.setdefault(digest(rest), []).append(point)
    return [_row(own) for own in together.values()]


def _row(own: Sequence[Point]) -> dict[str, Any]:
    results = [schema.Result.model_validate(read_json(p.folder / RESULT)) for p in own]
    main = own[0].settings.config.arm
    values: dict[str, list[float]] = {}
    for result in results:
        for score in next(arm for arm in result.arms if arm.name == main).scores:
            if score.score is not None:
                values.setdefault(f"{score.task}/{score.mode}", []).append(score.score)
    return {
        "where": {k: v for k, v in own[0].where.items() if k != "seed"},
        "seeds": [r.seed for r in results],
        "scores": {key: student(found) for key, found in values.items()},
        "bytes": statistics.fmean(r.bytes_up + r.bytes_down for r in results),
        "runs": [p.name for p in own],
    }
