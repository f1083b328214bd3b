"""Evaluate a model on a task: a per-sample log that grows while it runs, and a second call does what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.domains.base import Item, Task
from fedtune.evaluation import likelihood, official
from fedtune.evaluation.code import evaluate_programs
from fedtune.evaluation.extract import official_answer, official_correct, strict_answer
from fedtune.evaluation.items import TaskItems, load
from fedtune.evaluation.metrics import as_counted, summarise
from fedtune.evaluation.retry import Ask, Failed, batches
from fedtune.io import append_lines, digest, read_lines, update_lines, write_lines
from fedtune.results.manifest import code_sha256, versions
from fedtune.results.schema import Score
from fedtune.types import CorruptFileError

# items that are asked again together when one of them raises
LIKELIHOOD_BATCH = 32
OnItems = Callable[[str, int, int], None]
Sample = dict[str, Any]


def _likelihood_sample(item: Item, scores: list[float], kind: str) -> Sample:
    if kind == "solution":
        return {"value": scores[0], "gold": "", "predicted": "", "correct": False}
    best = max(range(len(scores)), key=scores.__getitem__)
    right = best == item.gold
    return {
        "gold": item.gold_answer,
        "predicted": item.answers[best],
        "answers": list(item.answers),
        "correct": right,
        "strict": right,
        "valid": True,
        "scores": scores,
    }


def _official_sample(item: Item, output: str, kind: Any) -> Sample:
    strict = strict_answer(output, kind, item.answers)
    return {
        "gold": item.gold_answer,
        "predicted": official_answer(output, kind),
        "answers": list(item.answers),
        "correct": official_correct(output, item.gold_answer, kind),
        "strict": strict == item.gold_answer,
        "valid": strict is not None,
        "output": output,
    }


def _error_sample(item: Item, text: str, kind: Any) -> Sample:
    """Return the row of an item that raised: wrong, and never dropped from the denominator."""
    if kind == "solution":
        return {"value": None, "gold": "", "predicted": "", "correct": False, "error": text}
    gold = item.gold_answer if len(item.answers) > 1 else ""
    return {"gold": gold, "predicted": "", "correct": False, "strict": False, "valid": False, "error": text}


def _outputs(model: Any, tokenizer: Any, task: Task, items: Sequence[Item], mode: str, config: Config) -> Ask[Any]:
    """Return what yields batches of raw results of some of the items: answer scores, or texts."""

    def ask(first: int, last: int) -> Iterator[Any]:
        some = items[first:last]
        if mode == "likelihood":
            return likelihood.score(model, tokenizer, some, task.kind, config)
        if task.kind == "sentiment":
            return official.sentiment(model, tokenizer, some, task.max_new_tokens, first)
        return official.choose(model, tokenizer, some, task.kind)

    return ask


def _sample(item: Item, raw: Any, kind: Any, mode: str) -> Sample:
    if isinstance(raw, Failed):
        return _error_sample(item, raw.text, kind)
    if mode == "likelihood" and any(math.isnan(score) for score in raw):
        # the largest of several NaNs would be the first answer
        return _error_sample(item, "the model's likelihood of an answer is not a number", kind)
    if mode == "likelihood" and max(raw) == -math.inf:
        return _error_sample(item, "the model's likelihood of every answer is zero", kind)
    return _likelihood_sample(item, raw, kind) if mode == "likelihood" else _official_sample(item, raw, kind)


def _same_prompts(loaded: TaskItems, mode: str) -> dict[int, Sample]:
    """Return what the samples say, by the items' places, whose output the official evaluation overwrites."""
    if mode != "official" or loaded.task.kind not in ("choice", "boolean"):
        return {}
    prompts = {place: item.prompt for place, item in zip(loaded.places, loaded.items, strict=True)}
    last = {prompt: place for place, prompt in prompts.items()}
    return {place: {"same_prompt_as": last[p]} for place, p in prompts.items() if last[p] != place}


def _header(loaded: TaskItems, mode: str, config: Config, identity: str) -> Sample:
    """Return a log's first line: everything that its samples depend on."""
    settings = digest([config.eval.prompt, config.prompt.model_dump(mode="json")])
    if loaded.task.kind == "program":
        settings = digest([config.eval.samples, config.eval.max_new_tokens])
    return {
        "task": loaded.task.name,
        "mode": mode,
        "items": loaded.sha256,
        "model": identity,
        "settings": settings,
        "code": digest([code_sha256(), versions()]),
    }


def _resumable(log: Path, header: Sample, places: Sequence[int]) -> list[Sample]:
    """Return the samples already in the log; a log of other items, model, settings or code is started anew.

    Raises:
        CorruptFileError: its samples are not those of the items in order: two evaluations wrote it at once.
    """
    lines = read_lines(log, torn_tail=True)
    if not lines or lines[0] != header:
        write_lines(log, [header])
        return []
    for number, (row, place) in enumerate(zip_longest(lines[1:], places[: len(lines) - 1]), 2):
        if not isinstance(row, dict) or row.get("i") != place:
            raise CorruptFileError(
                f"{log}: line {number} is not the sample of item {place}: was it written by two evaluations at once, "
                "or by hand? Move the file away, and the task is evaluated anew"
            )
    update_lines(log, lines)
    return lines[1:]


@dataclass
class _Log:
    """One task's per-sample log, open for what is missing."""

    path: Path
    loaded: TaskItems
    mode: str
    same: dict[int, Sample]
    rows: list[Sample]
    on_items: OnItems | None

    def add(self, samples: Sequence[Sample]) -> None:
        """Write the samples of the next items down."""
        fresh = []
        for i, sample in enumerate(samples, len(self.rows)):
            place = self.loaded.places[i]
            fresh.append({"i": place, "group": self.loaded.items[i].group, **sample, **self.same.get(place, {})})
        append_lines(self.path, fresh)
        self.rows += fresh
        if self.on_items:
            self.on_items(f"{self.loaded.task.name} ({self.mode})", len(self.rows), len(self.loaded.items))


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
    """Evaluate one task in one mode.

    Args:
        model, tokenizer: the model, in evaluation mode.
        loaded: the items.
        mode: `likelihood` or `official`; for programs `greedy` or `official`.
        config: prompts and limits.
        log: the per-sample JSON-lines file; a first line identifies what it is a log of.
        identity: hash of the model, its tokenizer and the adapter evaluated.
        on_items: progress, called with (task, done, all).

    Returns:
        The score; items that raised count as wrong, and above `eval.max_error_rate` it is withheld.

    Raises:
        CorruptFileError: the log cannot be continued.
    """
    task, items, header = loaded.task, loaded.items, _header(loaded, mode, config, identity)
    rows = _resumable(log, header, loaded.places)
    if task.kind == "program":
        return evaluate_programs(model, tokenizer, loaded, mode, config, log, rows, on_items)
    size = official.batch_size(task.kind) if mode == "official" else LIKELIHOOD_BATCH
    if mode == "official" and len(rows) < len(items):
        rows = rows[: len(rows) // size * size]
    same = _same_prompts(loaded, mode)
    done = _Log(log, loaded, mode, same, [row | same.get(row["i"], {}) for row in rows], on_items)
    update_lines(log, [header, *done.rows])
    for batch in batches(_outputs(model, tokenizer, task, items, mode, config), len(rows), len(items), size):
        some = items[len(done.rows) :]
        done.add([_sample(item, raw, task.kind, mode) for item, raw in zip(some, batch, strict=False)])
    return summarise(task.name, mode, task.kind, as_counted(done.rows), config.eval.max_error_rate, loaded.sha256)


def evaluate_all(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    config: Config,
    folder: Path,
    identity: str,
    on_items: OnItems | None = None,
) -> list[Score]:
    """Evaluate every task in every mode of the settings; solutions have no official mode.

    Raises:
        ModelError: prompts cannot be made as the settings say.
    """
    likelihood.check_prompt(tokenizer, config)
    scores = []
    for task in tasks:
        for mode in config.eval.modes:
            if mode == "official" and task.kind == "solution":
                continue
            # what a model writes has no likelihood of its own: programs are generated greedily instead
            name = "greedy" if task.kind == "program" and mode == "likelihood" else mode
            limit = config.eval.limit
            if mode == "official" and config.eval.official_limit:
                limit = min(limit or config.eval.official_limit, config.eval.official_limit)
            loaded = load(task, config, limit)
            log = folder / f"{task.name}.{name}.jsonl"
            scores.append(evaluate(model, tokenizer, loaded, name, config, log, identity, on_items))
    return scores
