"""Scores made again from their samples, down to the answers that were read out of texts and likelihoods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.board.sets import client_rooms, log_path
from fedtune.data.files import parse_rows, read_text_file
from fedtune.domains import TASKS
from fedtune.domains.base import LETTERS, SENTIMENTS, Task
from fedtune.domains.medical import VERDICTS
from fedtune.evaluation import again, programs
from fedtune.evaluation.average import mean_score
from fedtune.evaluation.extract import official_answer, official_correct, strict_answer
from fedtune.evaluation.metrics import as_counted, summarise
from fedtune.results.schema import Arm, Score
from fedtune.types import FedtuneError

Row = Mapping[str, Any]
# what a score says beside how many items it is of and why it is withheld
NUMBERS = ("score", "interval", "strict", "valid_rate", "macro_f1", "trivial", "details")
# intervals are drawn by the random numbers of one numpy; another may draw others
TOLERANCE = {"interval": 0.02}
VALUED = ("program", "solution")
FIXED = {"sentiment": [*SENTIMENTS], "boolean": [*VERDICTS]}


def _options(row: Row, kind: str) -> str:
    """Say what is wrong with what could be answered, or return an empty string."""
    answers, gold = row.get("answers"), row.get("gold")
    letters = isinstance(answers, list) and answers == list(LETTERS[: len(answers)])
    if not (answers == FIXED[kind] if kind in FIXED else letters):
        return "its possible answers are not those of the task"
    return "" if isinstance(answers, list) and gold in answers else f"its right answer {gold!r} is none of its answers"


def _judged(row: Row, predicted: str, right: bool, strict: str | None) -> str:
    """Hold what a sample says against what its text or likelihoods give."""
    want = {"predicted": predicted, "correct": right, "strict": strict == row["gold"], "valid": strict is not None}
    wrong = [name for name, value in want.items() if row.get(name) != value]
    return f"{wrong[0]} is {row.get(wrong[0])!r}, it gives {want[wrong[0]]!r}" if wrong else ""


def _likelihood(row: Row, kind: str) -> str:
    scores, answers = row.get("scores"), row.get("answers", ())
    numbers = isinstance(scores, list) and all(type(s) in (int, float) for s in scores)
    if not numbers or not scores or len(scores) != len(answers):
        return "it has not one likelihood for each answer"
    best = answers[max(range(len(scores)), key=scores.__getitem__)]
    return _judged(row, best, best == row["gold"], "" if best != row["gold"] else best)


def _official(row: Row, kind: Any) -> str:
    output = row.get("output")
    if not isinstance(output, str):
        return "it has no output"
    right = official_correct(output, row["gold"], kind)
    return _judged(row, official_answer(output, kind), right, strict_answer(output, kind, tuple(row["answers"])))


def _program(row: Row) -> str:
    texts, outcomes = row.get("programs"), row.get("outcomes")
    if not isinstance(texts, list) or not isinstance(outcomes, list) or len(texts) != len(outcomes) or not texts:
        return "it has not one outcome for each program"
    if not all(isinstance(t, str) for t in texts):
        return "its programs are not texts"
    passed = [o["kind"] == "passed" for o in outcomes]
    same = row.get("correct") == passed[0] and row.get("value") == sum(passed) / len(passed)
    return "" if same else "its value is not the share of its programs that passed"


def _reread(row: Row, kind: str, mode: str) -> str:
    """Say what is wrong with how a sample was judged, or return an empty string."""
    if not isinstance(row.get("i"), int):
        return "it has no place in the set"
    if row.get("error"):
        counts = any(row.get(k) for k in ("correct", "strict", "value", "valid", "predicted"))
        return "an item that raised has an answer or counts as right" if counts else ""
    if "value" in row and kind not in VALUED:
        return "it has a value, which only programs and solutions have"
    if kind == "program":
        return _program(row)
    if kind == "solution":
        return "" if type(row.get("value")) in (int, float) else "it has no value"
    return _options(row, kind) or (_likelihood if mode == "likelihood" else _official)(row, kind)


def impossible(score: Score) -> str:
    """Say why a score cannot have come from n items, or return an empty string."""
    if score.metric != "accuracy" or score.score is None:
        return ""
    if not 0 <= score.score <= 1:
        return f"{score.score} is not between 0 and 1"
    hits = score.score * score.n
    if not math.isclose(hits, round(hits), abs_tol=1e-6 * max(1, score.n)):
        return f"{score.score:.6g} is not k/{score.n} for any whole k"
    return ""


def _places(rows: Sequence[Row]) -> str:
    """Say which item is there twice, or return an empty string."""
    places = [row["i"] for row in rows]
    return "" if places == sorted(set(places)) else "an item is there twice, or they are not in order"


def _different(name: str, got: Any, want: Any) -> bool:
    """Tell whether two values of a score differ, numbers by more than rounding."""
    if isinstance(got, dict) and isinstance(want, dict):
        return got.keys() != want.keys() or any(_different(name, got[k], want[k]) for k in got)
    if isinstance(got, (tuple, list)) and isinstance(want, (tuple, list)):
        return len(got) != len(want) or any(_different(name, a, b) for a, b in zip(got, want, strict=True))
    if type(got) in (int, float) and type(want) in (int, float):
        return not math.isclose(got, want, rel_tol=0, abs_tol=TOLERANCE.get(name, 1e-9))
    return bool(got != want)


def _of_each(score: Score, samples: int) -> int:
    """Return how many programs there are of each item: greedy ones are alone."""
    return samples if score.mode == "official" else 1


def _uncounted(rows: Sequence[Row], count: int) -> str:
    """Say which item has not as many programs as the settings ask for, or return an empty string."""
    odd = next((r for r in rows if not isinstance(r.get("programs"), list) or len(r["programs"]) != count), None)
    return f"item {odd['i']} has not as many programs as the settings say ({count})" if odd else ""


def _made_again(score: Score, task: Task, rows: Sequence[Row], max_error_rate: float, samples: int) -> Score:
    if task.kind == "program":
        return programs.summarise(score.task, score.mode, rows, samples, score.items_sha256, max_error_rate)
    return summarise(score.task, score.mode, task.kind, as_counted(rows), max_error_rate, score.items_sha256)


def recomputed(folder: Path, arm: Arm, score: Score, max_error_rate: float = 0.01, samples: int = 1) -> Iterator[str]:
    """Yield what is wrong with a score, from the samples it stands on.

    Where each client has a model of its own, every client's score is made again, and then their mean with all its
    numbers. Programs that are said to pass are run again where that is possible here (`again.unable` tells).
    """
    if score.task not in TASKS:
        yield "is of no task that is known here"
        return
    rooms = client_rooms(folder, arm.name) if arm.per_client else [arm.name]
    values = arm.per_client.get(f"{score.task}/{score.mode}", [])
    if arm.per_client and len(rooms) != len(values):
        yield f"{len(values)} clients have a score, {len(rooms)} have samples"
        return
    yield from against(folder, rooms, score, max_error_rate, values, mean=bool(arm.per_client), samples=samples)


def _unscored(score: Score, path: str) -> Iterator[str]:
    """Yield what a score says although there are no samples; programs that could not be run here only say why."""
    said = [name for name in NUMBERS if getattr(score, name) not in (None, {})]
    if said or not score.withheld or TASKS[score.task].kind != "program":
        yield f"has no samples ({path})"


def against(
    folder: Path,
    rooms: Sequence[str],
    score: Score,
    max_error_rate: float,
    said: Sequence[float | None] = (),
    *,
    mean: bool = False,
    samples: int = 1,
) -> Iterator[str]:
    """Yield in what a score differs from the one its samples make.

    Args:
        folder: the packed run.
        rooms: where the samples are: of one model, or of each client's.
        score: as it is told.
        max_error_rate: above this share of errors it is withheld.
        said: each client's score as it is told, where it is.
        mean: the score is the mean of the clients', also of one alone.
        samples: programs of each item in official mode, as the settings say.
    """
    logs = [log_path(folder, room, score.task, score.mode) for room in rooms]
    if not any(log.exists() for log in logs):
        yield from _unscored(score, str(logs[0].relative_to(folder)) if logs else "of no client")
        return
    each = []
    for place, room in enumerate(rooms):
        made, wrong = _one(folder, room, score, max_error_rate, _of_each(score, samples))
        prefix = f"{room}: " if mean else ""
        yield from (f"{prefix}{why}" for why in wrong)
        if made is None:
            return
        if said and _different("score", made.score, said[place]):
            yield f"{prefix}score is {said[place]}, the samples give {made.score}"
        each.append(made)
    yield from _differences(score, mean_score(each, logs) if mean else each[0])


def _differences(said: Score, made: Score) -> Iterator[str]:
    if made.n != said.n:
        yield f"n = {said.n}, there are {made.n} samples"
    for name in Score.model_fields:
        if name != "n" and _different(name, getattr(made, name), getattr(said, name)):
            yield f"{name} is {getattr(said, name)}, the samples give {getattr(made, name)}"


def _one(
    folder: Path, room: str, score: Score, max_error_rate: float, count: int = 1
) -> tuple[Score | None, list[str]]:
    """Return the score that a log makes, if it is sound enough to make one, and what is wrong with its samples."""
    path, task = log_path(folder, room, score.task, score.mode), TASKS[score.task]
    if not path.exists():
        return None, [f"has no samples ({path.relative_to(folder)})"]
    header, *rows = parse_rows(read_text_file(path), str(path.relative_to(folder))) or [{}]
    found = []
    if (header.get("items"), header.get("task"), header.get("mode")) != (score.items_sha256, score.task, score.mode):
        found.append("its samples are of other items, or of another task or mode")
    wrong = [f"item {row.get('i')}: {why}" for row in rows if (why := _reread(row, task.kind, score.mode))]
    if wrong:
        return None, [*found, f"{len(wrong)} samples are judged wrongly; the first: {wrong[0]}"]
    if odd := _places(rows) or (_uncounted(rows, count) if task.kind == "program" else ""):
        return None, [*found, odd]
    run_again = _programs(task, rows) if task.kind == "program" else ()
    return _made_again(score, task, rows, max_error_rate, count), [*found, *run_again]


def _programs(task: Task, rows: Sequence[Row]) -> Iterator[str]:
    """Yield what running the programs again shows, where they can be run here."""
    if why := again.too_much(rows):
        yield why
    elif not again.unable(task):
        try:
            found = list(again.failing(task, rows))
        except FedtuneError as err:
            yield f"its programs could not be run again: {err}"
            return
        if found:
            count = f"at least {again.ENOUGH}" if len(found) == again.ENOUGH else str(len(found))
            place, ended = found[0]
            yield f"{count} programs do not pass as they are said to; the first: item {place}, {ended}"
