"""Scores made again from their samples, down to the answers that were read out of texts and likelihoods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.board.sets import log_path, subdirs_of
from fedtune.config.schema import EvalSettings
from fedtune.data.files import parse_rows, read_text_file
from fedtune.domains import TASKS
from fedtune.evaluation import scorers
from fedtune.evaluation.metrics import mean_score
from fedtune.evaluation.scorers import Scorer
from fedtune.results.schema import Arm, Score

Row = Mapping[str, Any]
# what a score says beside how many items it is of and why it is withheld
NUMBERS = ("score", "interval", "strict", "valid_rate", "macro_f1", "trivial", "details")
# intervals are drawn by the random numbers of one numpy; another may draw others
TOLERANCE = {"interval": 0.02}


def impossible(score: Score) -> str:
    """Say why a score cannot have come from n items, or return an empty string."""
    if score.score is None or not scorers.metric(score.metric).hits:
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


def recomputed(folder: Path, arm: Arm, score: Score, settings: EvalSettings | None = None) -> Iterator[str]:
    """Yield what is wrong with an arm's score, from the samples in the packed run that it stands on.

    Where each client has a model of its own, every client's score is made again, and then their mean with all its
    numbers. Programs that are said to pass are run again where that is possible here (`not_run_again` tells).
    """
    if score.task not in TASKS:
        yield "is of no task that is known here"
        return
    subdirs = subdirs_of(folder, arm)
    values = arm.per_client.get(score.key, [])
    if arm.per_client and len(subdirs) != len(values):
        yield f"{len(values)} clients have a score, {len(subdirs)} have samples"
        return
    yield from against(folder, subdirs, score, settings or EvalSettings(), values, mean=bool(arm.per_client))


def _unscored(score: Score, scorer: Scorer, path: str) -> Iterator[str]:
    """Yield what a score says although there are no samples; what a machine could not run only says why."""
    said = [name for name in NUMBERS if getattr(score, name) not in (None, {})]
    if said or not score.withheld or not scorer.samples_optional:
        yield f"has no samples ({path})"


def against(
    folder: Path,
    subdirs: Sequence[str],
    score: Score,
    settings: EvalSettings,
    said: Sequence[float | None] = (),
    *,
    mean: bool = False,
) -> Iterator[str]:
    """Yield in what a score differs from the one its samples make, which lie in a subdir for each model.

    `said` is each client's score as it is told, where it is. With `mean` it is the clients' mean, also of one alone.
    """
    scorer = scorers.find(TASKS[score.task], score.mode)
    if scorer is None:
        yield "is of no mode that this task is scored in"
        return
    logs = [log_path(folder, subdir, score.task, score.mode) for subdir in subdirs]
    if not any(log.exists() for log in logs):
        yield from _unscored(score, scorer, str(logs[0].relative_to(folder)) if logs else "of no client")
        return
    each = []
    for place, subdir in enumerate(subdirs):
        made, wrong = _one(folder, subdir, score, scorer, settings)
        prefix = f"{subdir}: " if mean else ""
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
    folder: Path, subdir: str, score: Score, scorer: Scorer, settings: EvalSettings
) -> tuple[Score | None, list[str]]:
    """Return the score that a log makes, if it is sound enough to make one, and what is wrong with its samples."""
    path, task = log_path(folder, subdir, score.task, score.mode), TASKS[score.task]
    if not path.exists():
        return None, [f"has no samples ({path.relative_to(folder)})"]
    header, *rows = parse_rows(read_text_file(path), str(path.relative_to(folder))) or [{}]
    found = []
    if (header.get("items"), header.get("task"), header.get("mode")) != (score.items_sha256, score.task, score.mode):
        found.append("its samples are of other items, or of another task or mode")
    wrong = [f"item {row.get('i')}: {why}" for row in rows if (why := scorer.misjudged(row))]
    if wrong:
        return None, [*found, f"{len(wrong)} samples are judged wrongly; the first: {wrong[0]}"]
    if why := _places(rows) or scorer.check_log(rows, settings):
        return None, [*found, why]
    run_again = scorer.run_again(task, rows)
    return scorer.summarise(score.task, rows, settings, score.items_sha256), [*found, *run_again]
