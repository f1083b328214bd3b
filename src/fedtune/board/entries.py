"""From run folders to entries, and the store of entries: a folder of JSON files in git."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtune.config import load
from fedtune.config.load import read_toml
from fedtune.data.files import parse_rows, read_text_file
from fedtune.evaluation.metrics import as_counted, sample_value
from fedtune.io import read_json, read_lines, write_json
from fedtune.models.zoo import zoo
from fedtune.results.entry import Answers, Costs, Entry, Point
from fedtune.results.schema import Arm, Result, Score
from fedtune.types import CorruptFileError, DataError

WEIGHTS = "adapter/adapter_model.safetensors"


def _samples(run: Path, arm: Arm, score: Score) -> list[dict[str, Any]]:
    """Return the samples of a score, from a run folder or a packed one; none where there is no log."""
    log = run / "evals" / arm.name / f"{score.task}.{score.mode}.jsonl"
    path = next((p for p in (log, log.with_suffix(".jsonl.gz")) if p.exists()), None)
    return parse_rows(read_text_file(path), str(path))[1:] if path else []


def _answers(run: Path, arm: Arm) -> Iterator[tuple[str, Answers]]:
    """Yield which items an arm had right; of tasks with one sample an item, and one model."""
    for score in arm.scores:
        known = score.metric != "nats_per_token"
        values = [sample_value(r) for r in as_counted(_samples(run, arm, score))] if known else []
        if values and set(values) <= {0.0, 1.0}:
            packed = Answers.pack([v == 1 for v in values], score.items_sha256)
            yield f"{arm.name}/{score.task}/{score.mode}", packed


def _curve(run: Path) -> list[Point]:
    path = run / "curve.jsonl"
    lines = read_lines(path) if path.exists() else []
    return [Point(round=x["round"], task=x["task"], mode=x["mode"], score=x["score"]) for x in lines]


def _costs(run: Path, result: Result, manifest: dict[str, Any]) -> Costs:
    weights = run / WEIGHTS
    seconds = sum(manifest.get("seconds", {}).values()) or None
    devices = manifest.get("machine", {}).get("gpus", 0)
    return Costs(
        bytes_up=result.bytes_up,
        bytes_down=result.bytes_down,
        wall_seconds=seconds,
        gpu_seconds=seconds * devices if seconds and devices else None,
        peak_memory_bytes=manifest.get("peak_memory_bytes"),
        energy_joules=manifest.get("energy_joules"),
        trainable_parameters=result.trainable_parameters,
        adapter_bytes=weights.stat().st_size if weights.exists() else None,
    )


def from_run(run: Path, team: str = "", title: str = "", link: str = "") -> Entry:
    """Read a finished run folder as an entry.

    Raises:
        DataError: the run is not complete.
        CorruptFileError: a file of it is damaged.
    """
    manifest = read_json(run / "manifest.json")
    if manifest.get("status") != "complete":
        raise DataError(f"{run}: the run is {manifest.get('status')}; continue it with fedtune run --resume")
    result = Result.model_validate(read_json(run / "result.json"))
    known = zoo().get(result.model)
    answers = dict(pair for arm in result.arms for pair in _answers(run, arm))
    losses = [_loss(line) for line in read_lines(run / "rounds.jsonl")]
    return Entry(
        team=team,
        title=title,
        link=link,
        domain=result.domain,
        base=result.model,
        revision=result.revision,
        base_millions=known.parameters if known else None,
        method=result.method,
        seed=result.seed,
        config=result.config,
        config_sha256=_without_seed(run),
        protocol=result.protocol,
        protocol_sha256=result.protocol_sha256,
        unranked=result.unranked,
        arms=result.arms,
        answers=answers,
        curve=_curve(run),
        losses=losses,
        rounds=result.rounds,
        lost_clients=result.lost_clients,
        skipped_rounds=result.skipped_rounds,
        data=result.data,
        costs=_costs(run, result, manifest),
        code=manifest.get("code", {}),
        versions=manifest.get("versions", {}),
        machine=manifest.get("machine", {}),
    )


def _loss(line: dict[str, Any]) -> float | None:
    known = [(c["loss"], c["examples"]) for c in line["clients"] if c["loss"] is not None]
    weight = sum(n for _, n in known)
    return sum(loss * n for loss, n in known) / weight if weight else None


def recipe_hash(config_file: Path) -> str:
    """Return the hash of a run's settings without their seed: the same for all seeds of one recipe.

    Raises:
        ConfigError, CorruptFileError: not a settings file.
    """
    settings = load([read_toml(config_file)])
    return settings.config.model_copy(update={"seed": 0}).hash


def _without_seed(run: Path) -> str:
    return recipe_hash(run / "config.toml")


def read_entry(path: Path) -> Entry:
    """Read an entry.

    Raises:
        CorruptFileError: not JSON, or not an entry; with the first reason.
    """
    try:
        return Entry.model_validate(read_json(path))
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptFileError(f"{path}: {where}: {first['msg']}") from err


def write_entry(store: Path, entry: Entry) -> Path:
    """Put an entry at its place in the store.

    Raises:
        DataError: another entry is there already.
    """
    target = store / entry.place()
    plain = entry.model_dump(mode="json")
    if target.exists() and read_json(target) != json.loads(json.dumps(plain)):
        raise DataError(f"{target}: there is an entry of this recipe and seed already, and it is another one")
    write_json(target, plain)
    return target


def twin(store: Path, entry: Entry) -> Path | None:
    """Return another place in the store whose entry has the very same samples, if there is one."""
    logs = {name: sha for name, sha in entry.files.items() if name.startswith("evals/federated")}
    for path, other in read_store(store):
        if logs and path != store / entry.place() and logs.items() <= other.files.items():
            return path
    return None


def read_store(store: Path) -> Iterable[tuple[Path, Entry]]:
    """Yield every entry of a store, in the order of their paths.

    Raises:
        CorruptFileError: one that cannot be read.
    """
    for path in sorted(store.rglob("*.json")):
        yield path, read_entry(path)
