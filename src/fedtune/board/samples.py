"""Scores made again from their samples, down to the answers that were read out of texts and likelihoods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.data.files import parse_rows, read_text_file
from fedtune.domains import TASKS
from fedtune.evaluation import programs
from fedtune.evaluation.extract import official_answer, official_correct
from fedtune.evaluation.metrics import as_counted, summarise
from fedtune.results.schema import Arm, Score


def _log(folder: Path, room: str, score: Score) -> Path:
    return folder / "evals" / room / f"{score.task}.{score.mode}.jsonl.gz"


def _reread(row: dict[str, Any], kind: Any, mode: str) -> str:
    """Say what is wrong with how a sample was judged, or return an empty string."""
    if row.get("error"):
        return "an item that raised counts as right" if row["correct"] else ""
    if mode == "likelihood" and "scores" in row:
        best = row["answers"][max(range(len(row["scores"])), key=row["scores"].__getitem__)]
        if row["predicted"] != best or bool(row["correct"]) != (best == row["gold"]):
            return f"item {row['i']}: the likeliest answer is {best!r}, gold {row['gold']!r}"
    if mode == "official" and "output" in row and kind in ("sentiment", "choice", "boolean"):
        right = official_correct(row["output"], row["gold"], kind)
        if bool(row["correct"]) != right or row["predicted"] != official_answer(row["output"], kind):
            return f"item {row['i']}: its text is read as {official_answer(row['output'], kind)!r}"
    return ""


def _kind(task: str, score: Score) -> Any:
    if task in TASKS:
        return TASKS[task].kind
    return "solution" if score.metric == "nats_per_token" else "program" if score.metric == "pass@1" else "choice"


def _different(got: float | None, want: float | None) -> bool:
    if got is None or want is None:
        return got is not want
    return not math.isclose(got, want, rel_tol=0, abs_tol=1e-9)


def recomputed(folder: Path, arm: Arm, score: Score) -> Iterator[str]:
    """Yield what is wrong with a score, from the samples it stands on."""
    if arm.per_client:
        rooms = sorted(p.name for p in (folder / "evals" / arm.name).glob("client-*"))
        values = arm.per_client.get(f"{score.task}/{score.mode}", [])
        if len(rooms) != len(values):
            yield f"{len(values)} clients have a score, {len(rooms)} have samples"
            return
        for room, value in zip(rooms, values, strict=True):
            client = score.model_copy(update={"score": value})
            yield from (f"{room}: {why}" for why in _one(folder, f"{arm.name}/{room}", client, whole=False))
        known = [v for v in values if v is not None]
        if score.score is not None and (not known or _different(sum(known) / len(known), score.score)):
            yield "is not the mean of its clients' scores"
        return
    yield from _one(folder, arm.name, score, whole=True)


def _one(folder: Path, room: str, score: Score, *, whole: bool) -> Iterator[str]:
    path = _log(folder, room, score)
    if not path.exists():
        yield f"has no samples ({path.relative_to(folder)})"
        return
    header, *rows = parse_rows(read_text_file(path), str(path))
    kind = _kind(score.task, score)
    if header.get("items") != score.items_sha256:
        yield "its samples are of other items"
    wrong = [why for row in rows if (why := _reread(row, kind, score.mode))]
    if wrong:
        yield f"{len(wrong)} samples are judged wrongly; the first: {wrong[0]}"
    if kind == "program":
        programs_again = programs.summarise(score.task, score.mode, rows)
        if _different(programs_again.score, score.score) or programs_again.n != score.n:
            yield f"pass@1 is {score.score} of {score.n}, the samples give {programs_again.score} of {programs_again.n}"
        return
    again = summarise(score.task, score.mode, kind, as_counted(rows), items=score.items_sha256)
    if again.n != score.n:
        yield f"n = {score.n}, there are {again.n} samples"
    for name in ("score", "strict", "valid_rate") if whole else ("score",):
        if _different(getattr(again, name), getattr(score, name)):
            yield f"{name} is {getattr(score, name)}, the samples give {getattr(again, name)}"
