"""Several runs by one command: every combination of domains, methods, seeds and settings, and what came of them.

Runs that share a base model and an adapter's shape share one model in memory, and are one cohort where the plan trains
clients together. A run that is complete is not done again, and one that was cut off goes on.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config import Config, Settings
from fedtune.experiment.folder import MANIFEST, cancellable
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.resident import Resident
from fedtune.experiment.run import steps
from fedtune.federation.pool import Steps, finish
from fedtune.io import digest, read_json, write_json
from fedtune.results import schema
from fedtune.results.stats import student
from fedtune.training import workload
from fedtune.types import ConfigError, FedtuneError, Problem, ResumeError, RunFailedError

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
    """Return every combination of the values of some settings (dotted keys); `build` turns each into valid settings.

    Raises:
        ConfigError: an axis is empty or has a value twice, or settings are not valid.
    """
    _check(axes)
    found = []
    for values in itertools.product(*axes.values()):
        where = dict(zip(axes, values, strict=True))
        text = "-".join(str(v) for v in values)
        readable = "".join(c if c.isalnum() or c in "-._" else "_" for c in text)[:80]
        settings = build(where)
        found.append(Point(settings, where, out / f"{readable}-{digest(where)[:6]}"))
    return found


def _check(axes: Mapping[str, Sequence[Any]]) -> None:
    """Refuse axes that give no run, or one run twice."""
    problems = [Problem(name, "has no value", "name at least one") for name, values in axes.items() if not values]
    counts = ((name, v, n) for name, values in axes.items() for v, n in Counter(map(str, values)).items())
    problems += [Problem(name, f"has {v} twice", "once is enough") for name, v, n in counts if n > 1]
    if problems:
        raise ConfigError("sweep", problems)


def _state(point: Point) -> str:
    """Return how far a run of the sweep is.

    Raises:
        ResumeError: its folder has a run with other settings. CorruptFileError: its manifest cannot be read.
    """
    path = point.folder / MANIFEST
    if not path.exists():
        return "new"
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("config_sha256") != point.settings.config.hash:
        raise ResumeError(f"{point.folder} has a run with other settings; choose another --out")
    return str(manifest.get("status"))


def _fault(err: Exception) -> str:
    """Return why a run failed."""
    return f"{type(err).__name__}: {' '.join(str(err).split()) if not isinstance(err, FedtuneError) else err}"


def groups(chosen: Sequence[Point]) -> list[list[Point]]:
    """Return the points by what they can share: base model, adapter and engine."""
    shared: dict[str, list[Point]] = {}
    for point in chosen:
        plain = point.settings.config.plain()
        shared.setdefault(digest([plain[key] for key in ("model", "peft", "lora", "engine")]), []).append(point)
    return list(shared.values())


class _Watch(Reporter):
    """Passes on what one run of a sweep says, under its name."""

    def __init__(self, inner: Reporter, name: str) -> None:
        self._inner, self._name = inner, name

    def note(self, text: str) -> None:
        self._inner.note(f"{self._name}: {text}")

    def round(self, record: Any) -> None:
        losses = [c.loss for c in record.clients if c.loss is not None]
        shown = f", loss {statistics.fmean(losses):.4f}" if losses else ""
        self._inner.note(f"{self._name}: round {record.round} {record.status}{shown}")


def _one(point: Point, resident: Resident, watch: Reporter) -> Steps[str]:
    """Do one run; a fault of its own ends it alone."""
    reporter = _Watch(watch, point.name)
    try:
        again = _state(point) != "new"
        yield from steps(point.settings, point.folder, resume=again, reporter=reporter, resident=resident)
    except Exception as err:  # out of memory, say: the next one may need less
        watch.note(f"{point.name}: failed: {_fault(err)}")
        return _fault(err)
    return ""


def _longest(configs: Sequence[Config], resident: Resident) -> workload.EncodedShards:
    """Return the shards with the longest text of all runs: what fits must fit for each."""
    parts = ("data", "prompt", "objective")
    different = {digest([c.domain, *(c.plain()[part] for part in parts), c.train.max_length]): c for c in configs}
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
        for start in range(0, len(chosen), resident.pool.size):
            some = chosen[start : start + resident.pool.size]
            ended = finish([_one(point, resident, watch) for point in some])
            faults |= {p.name: fault for p, done in zip(some, ended, strict=True) if (fault := done.result())}
    finally:
        resident.end()
    return faults


def sweep(chosen: Sequence[Point], out: Path, watch: Reporter = Reporter()) -> list[dict[str, Any]]:
    """Do all runs that are not complete, and summarise all.

    Returns:
        The rows of the summary, which is also written to `sweep.json`.

    Raises:
        RunFailedError: some runs failed; the others are done, and the summary says which.
        CancelledError: Ctrl-C or SIGTERM; the same command goes on.
    """
    states: dict[str, str] = {}
    faults: dict[str, str] = {}
    for point in chosen:
        try:
            states[point.name] = _state(point)
        except FedtuneError as err:
            faults[point.name] = _fault(err)
    waiting = [p for p in chosen if states.get(p.name, "complete") != "complete"]
    if complete := sum(state == "complete" for state in states.values()):
        watch.note(f"{complete} of {len(chosen)} runs are complete already")
    with cancellable("continue with the same command"):
        for group in groups(waiting):
            try:
                faults |= _group(group, watch)
            except Exception as err:  # of what they share: model, data, plan
                faults |= {point.name: _fault(err) for point in group}
                watch.note(f"{len(group)} runs failed: {_fault(err)}")
    rows = summary([p for p in chosen if p.name not in faults], faults)
    write_json(out / SUMMARY, {"rows": rows, "failed": faults})
    if faults:
        listed = "".join(f"\n  {name}: {why}" for name, why in faults.items())
        raise RunFailedError(f"{len(faults)} of {len(chosen)} runs failed:{listed}")
    return rows


def summary(chosen: Sequence[Point], faults: dict[str, str]) -> list[dict[str, Any]]:
    """Return one row for each combination but for seeds: each score's mean over them, with its 95 % interval.

    All runs are complete; one whose result cannot be read is left out, and added to the faults.
    """
    together: dict[str, list[tuple[Point, schema.Result]]] = {}
    for point in chosen:
        try:
            result = schema.Result.read(point.folder)
        except (FedtuneError, ValueError) as err:
            faults[point.name] = _fault(err)
            continue
        rest = {k: v for k, v in point.where.items() if k != "seed"}
        together.setdefault(digest(rest), []).append((point, result))
    return [_row([p for p, _ in own], [r for _, r in own]) for own in together.values()]


def _row(own: Sequence[Point], results: Sequence[schema.Result]) -> dict[str, Any]:
    main = own[0].settings.config.arm
    values: dict[str, list[float]] = {}
    withheld: dict[str, str] = {}
    asked = 0
    for point, result in zip(own, results, strict=True):
        scores = next(arm for arm in result.arms if arm.name == main).scores
        asked += len(scores)
        withheld |= {f"{point.name} {key}": why for key, why in schema.withheld(scores).items()}
        for score in scores:
            if score.score is not None:
                values.setdefault(score.key, []).append(score.score)
    return {
        "where": {k: v for k, v in own[0].where.items() if k != "seed"},
        "seeds": [r.seed for r in results],
        "scores": {key: student(found) for key, found in values.items()},
        "asked": asked,
        "withheld": withheld,
        "bytes": statistics.fmean(r.bytes_up + r.bytes_down for r in results),
        "runs": [p.name for p in own],
    }
