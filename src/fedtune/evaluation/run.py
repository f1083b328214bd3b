"""Evaluate a model on a task: a per-sample log that grows while it runs, and a second call does what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.domains.base import Item, Task
from fedtune.evaluation import scorers
from fedtune.evaluation.items import TaskItems, load
from fedtune.evaluation.retry import batches
from fedtune.evaluation.scorers import Scorer
from fedtune.io import append_lines, digest, read_lines, update_lines, write_lines
from fedtune.results.manifest import code_sha256, versions
from fedtune.results.schema import Score
from fedtune.types import CorruptFileError

OnItems = Callable[[str, int, int], None]
Sample = dict[str, Any]


def _header(loaded: TaskItems, scorer: Scorer, config: Config, identity: str) -> Sample:
    """Return a log's first line: everything that its samples depend on."""
    origin = scorers.KINDS.origin(loaded.task.kind)
    return {
        "task": loaded.task.name,
        "mode": scorer.mode,
        "items": loaded.sha256,
        "model": identity,
        "settings": digest(scorer.depends_on(config)),
        "code": digest([code_sha256(), versions(), *([origin.sha256] if origin else [])]),
    }


def _refused(log: Path, why: str) -> CorruptFileError:
    return CorruptFileError(f"{log}: {why}. Move the file away, and the task is evaluated anew")


def _unsound(row: Sample, item: Item, mark: Sample, scorer: Scorer) -> str:
    """Say why a sample is not what its item and its own answer make, or return an empty string."""
    try:
        if why := scorer.foreign(row, item) or scorer.misjudged(row):
            return why
    except (TypeError, LookupError, ValueError, AttributeError, OverflowError) as err:
        return f"is not what an evaluation writes ({type(err).__name__}: {err})"
    differs = any(row.get(key) not in (None, mark.get(key)) for key in ("same_prompt_as", *mark))
    return "its prompt is not that of the sample it names" if differs else ""


def _resumable(
    log: Path, header: Sample, loaded: TaskItems, scorer: Scorer, marks: Mapping[int, Sample]
) -> list[Sample]:
    """Return the samples already in the log, annotated by `marks`; one of another header is started anew.

    Raises:
        CorruptFileError: its samples are not those of the items in order: two evaluations wrote it at once; or one is
            judged otherwise than its own answer says.
    """
    lines = read_lines(log, torn_tail=True)
    if not lines or lines[0] != header:
        write_lines(log, [header])
        return []
    for number, (row, place) in enumerate(zip_longest(lines[1:], loaded.places[: len(lines) - 1]), 2):
        if place is None or not isinstance(row, dict) or row.get("i") != place:
            where = "an item" if place is None else f"item {place}"
            raise CorruptFileError(
                f"{log}: line {number} is not the sample of {where}: was it written by two evaluations at once, "
                "or by hand? Move the file away, and the task is evaluated anew"
            )
        if why := _unsound(row, loaded.items[number - 2], marks.get(place, {}), scorer):
            raise _refused(log, f"line {number}: {why}")
    return [row | marks.get(row["i"], {}) for row in lines[1:]]


def evaluate(
    model: Any,
    tokenizer: Any,
    loaded: TaskItems,
    mode: str,
    config: Config,
    log: Path,
    identity: str,
    on_items: OnItems | None = None,
) -> Score:
    """Evaluate one task in one mode; items that raised count as wrong, above `eval.max_error_rate` there is no score.

    Args:
        model, tokenizer: the model, in evaluation mode.
        mode: one of the modes that the task's kind is scored in, as results name it.
        log: the per-sample JSON-lines file; a first line identifies what it is a log of.
        identity: hash of the model, its tokenizer and the adapter evaluated.
        on_items: progress, called with (task, done, all).

    Raises:
        ValueError: the task's kind is not scored in this mode.
        CorruptFileError: the log cannot be continued.
        FedtuneError: nothing of this kind can be scored on this machine.
    """
    task, scorer = loaded.task, scorers.find(loaded.task, mode)
    if scorer is None:
        raise ValueError(f"{task.name} is not scored in the mode {mode!r}")
    solver, count, marks = scorer.solver(), len(loaded.items), scorer.annotations(loaded)
    header = _header(loaded, scorer, config, identity)
    rows = _resumable(log, header, loaded, scorer, marks)
    if reason := scorer.unavailable(task):
        return Score(task=task.name, mode=mode, metric=scorer.metric.name, n=count, score=None, withheld=reason)
    tests = {place: item.gold_answer for place, item in zip(loaded.places, loaded.items, strict=True)}
    if why := scorer.check_log(rows, config.eval) or next(scorer.run_again(task, rows, tests), ""):
        raise _refused(log, why)
    if solver.whole and len(rows) < count:
        rows = rows[: len(rows) // solver.size * solver.size]
    update_lines(log, [header, *rows])

    def ask(first: int, last: int) -> Iterator[list[Any]]:
        return solver.answers(model, tokenizer, loaded, first, last, config)

    with solver.prepared(model):
        for batch in batches(ask, len(rows), count, solver.size):
            fresh = [s | marks.get(s["i"], {}) for s in scorer.samples(loaded, len(rows), batch, config.eval)]
            append_lines(log, fresh)
            rows += fresh
            if on_items:
                on_items(f"{task.name} ({mode})", len(rows), count)
    return scorer.summarise(task.name, rows, config.eval, loaded.sha256)


def check_tasks(tasks: Sequence[Task], config: Config) -> None:
    """Read every set once, and look for what scoring it takes, so that a lack is known before any training.

    Raises:
        FedtuneError: a set, or all that could score it, is missing here.
    """
    for task in tasks:
        load(task, config, 1)
        for scorer in scorers.planned(task, config.eval):
            scorer.unavailable(task)


def check_prompts(tokenizer: Any, tasks: Sequence[Task], config: Config) -> None:
    """Refuse prompts that cannot be made for this model as the settings say. Raises ModelError."""
    for task in tasks:
        for scorer in scorers.planned(task, config.eval):
            scorer.solver().check(tokenizer, config)


def evaluate_all(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    config: Config,
    folder: Path,
    identity: str,
    on_items: OnItems | None = None,
) -> list[Score]:
    """Evaluate every task in every mode of the settings that its kind has.

    Raises:
        ModelError: prompts cannot be made as the settings say.
    """
    check_prompts(tokenizer, tasks, config)
    scores = []
    for task in tasks:
        for scorer in scorers.planned(task, config.eval):
            loaded = load(task, config, scorer.limit(config.eval))
            log = folder / f"{task.name}.{scorer.mode}.jsonl"
            scores.append(evaluate(model, tokenizer, loaded, scorer.mode, config, log, identity, on_items))
    return scores
