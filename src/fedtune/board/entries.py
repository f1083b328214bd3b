"""Entries from run folders and packed ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtune.board import sets
from fedtune.board.adapter import ADAPTER
from fedtune.board.sets import samples
from fedtune.config.load import read_toml
from fedtune.domains import TASKS
from fedtune.evaluation import scorers
from fedtune.evaluation.known import samples_sha256
from fedtune.evaluation.metrics import as_counted, sample_value
from fedtune.io import only_files, read_json, read_lines, reading
from fedtune.models.zoo import zoo
from fedtune.results.bounds import as_reason
from fedtune.results.entry import Answers, Costs, Entry, Point
from fedtune.results.schema import Arm, Result
from fedtune.settings import load
from fedtune.types import ConfigError, CorruptFileError, DataError


def _answers(run: Path, arm: Arm) -> Iterator[tuple[str, Answers]]:
    """Yield which items an arm had right; of tasks with one sample an item, and one model."""
    if arm.per_client:
        return
    for score in arm.scores:
        if score.task not in TASKS or not scorers.metric(score.metric).averaged:
            continue
        with reading(run / "evals" / arm.name / f"{score.task}.{score.mode}.jsonl"):
            rows = samples(run, arm.name, score.task, score.mode)
            values = [sample_value(r) for r in as_counted(rows)]
            # paired by what the samples hold, not by the hash that a submitter says
            items = samples_sha256(rows, scorers.one_of(TASKS[score.task]).key)
        if values and set(values) <= {0.0, 1.0}:
            packed = Answers.pack([v == 1 for v in values], items)
            yield f"{arm.name}/{score.key}", packed


def _curve(run: Path) -> list[Point]:
    path = run / "curve.jsonl"
    with reading(path):
        return [Point(round=x["round"], task=x["task"], mode=x["mode"], score=x["score"]) for x in read_lines(path)]


def _costs(run: Path, result: Result, manifest: dict[str, Any]) -> Costs:
    weights = run / ADAPTER
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
        CorruptFileError: a file of it is damaged, or a link.
        ValidationError: team, title or link is not plain text.
    """
    only_files(run)
    try:
        return _read(run, {"team": team, "title": title, "link": link})
    except ValidationError as err:
        first = err.errors()[0]
        if first["loc"][:1] in (("team",), ("title",), ("link",)):
            raise
        where = ".".join(map(str, first["loc"])) or "the document"
        raise CorruptFileError(f"{run}: is not of its format: {where}: {first['msg']}") from err
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as err:
        raise CorruptFileError(f"{run}: is not of its format ({type(err).__name__}: {err})") from err


def _read(run: Path, texts: dict[str, str]) -> Entry:
    manifest = read_json(run / "manifest.json")
    if manifest.get("status") != "complete":
        raise DataError(f"{run}: the run is {manifest.get('status')}; continue it with fedtune run --resume")
    result = Result.model_validate(read_json(run / "result.json"))
    known = zoo().get(result.model)
    answers = dict(pair for arm in result.arms for pair in _answers(run, arm))
    main = next((a for a in result.arms if a.name == "federated"), result.arms[-1])
    arms = [main, *(a for a in result.arms if a.name == "base" and a is not main)]
    # the manifest knows of a run that was continued although something had changed
    unranked = [*result.unranked, *manifest.get("unranked", ()), *sets.reasons(run, result.domain, arms)]
    with reading(run / "rounds.jsonl"):
        losses = [_loss(line) for line in read_lines(run / "rounds.jsonl")]
    return Entry(
        **texts,
        domain=result.domain,
        base=result.model,
        revision=result.revision,
        base_millions=known.parameters if known else None,
        method=result.method,
        seed=result.seed,
        config=result.config,
        config_sha256=recipe_hash(run / "config.toml"),
        protocol=result.protocol,
        protocol_sha256=result.protocol_sha256,
        unranked=list(dict.fromkeys(map(as_reason, unranked))),
        arms=result.arms,
        answers=answers,
        curve=_curve(run),
        losses=losses,
        samples_sha256=sets.fingerprints(run, main, losses),
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
    try:
        settings = load([read_toml(config_file)], here=False)
    except ConfigError as err:
        raise ConfigError(str(config_file), err.problems) from err
    return settings.config.model_copy(update={"seed": 0}).hash
