"""Evaluate a model on a task: a per-sample log that grows while it runs, and a second call does what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.domains.base import Item, Task
from fedtune.evaluation import likelihood, official
from fedtune.evaluation.code import evaluate_programs
from fedtune.evaluation.extract import official_answer, official_correct, strict_answer
from fedtune.evaluation.items import TaskItems, load
from fedtune.evaluation.metrics import as_counted, summarise
from fedtune.io import append_lines, digest, read_lines, write_lines
from fedtune.results.schema import Score

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


def _error_sample(item: Item, error: Exception) -> Sample:
    """Return the row of an item that raised: wrong, and never dropped from the denominator."""
    gold = item.gold_answer if len(item.answers) > 1 else ""
    text = f"{type(error).__name__}: {error}"
    return {"gold": gold, "predicted": "", "correct": False, "strict": False, "valid": False, "error": text}


def _outputs(model: Any, tokenizer: Any, task: Task, items: Sequence[Item], mode: str, config: Config) -> Iterator[Any]:
    """Yield batches of raw results: answer scores, or texts."""
    if mode == "likelihood":
        return likelihood.score(model, tokenizer, items, task.kind, config)
    if task.kind == "sentiment":
        return official.sentiment(model, tokenizer, items, task.max_new_tokens)
    return official.choose(model, tokenizer, items, task.kind)


def _samples(
    model: Any, tokenizer: Any, task: Task, items: Sequence[Item], mode: str, config: Config
) -> Iterator[list[Sample]]:
    """Yield batches of samples; a batch that raises is tried again item by item, so that one item fails alone."""
    make = _likelihood_sample if mode == "likelihood" else _official_sample
    done = 0
    try:
        for batch in _outputs(model, tokenizer, task, items, mode, config):
            part = items[done : done + len(batch)]
            yield [make(item, raw, task.kind) for item, raw in zip(part, batch, strict=True)]
            done += len(batch)
        return
    except (RuntimeError, ValueError, IndexError) as err:
        if len(items) == 1:
            yield [_error_sample(items[0], err)]
            return
    for item in items[done:]:
        yield from _samples(model, tokenizer, task, [item], mode, config)


def _same_prompts(loaded: TaskItems, mode: str) -> dict[int, Sample]:
    """Return what the samples say, by the items' places, whose output the official evaluation overwrites."""
    if mode != "official" or loaded.task.kind not in ("choice", "boolean"):
        return {}
    prompts = {place: item.prompt for place, item in zip(loaded.places, loaded.items, strict=True)}
    last = {prompt: place for place, prompt in prompts.items()}
    return {place: {"same_prompt_as": last[p]} for place, p in prompts.items() if last[p] != place}


def _resumable(log: Path, header: Sample) -> list[Sample]:
    """Return the samples already in the log; a log of other items, model or settings is started anew."""
    lines = read_lines(log, torn_tail=True)
    if not lines or lines[0] != header:
        write_lines(log, [header])
        return []
    write_lines(log, lines)
    return lines[1:]


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
        identity: hash of the model and adapter evaluated.
        on_items: progress, called with (task, done, all).

    Returns:
        The score; items that raised count as wrong, and above `eval.max_error_rate` it is withheld.
    """
    task = loaded.task
    settings = digest([config.eval.prompt, config.prompt.model_dump(mode="json")])
    if task.kind == "program":
        settings = digest([config.eval.samples, config.eval.max_new_tokens])
    header = {
        "task": task.name,
        "mode": mode,
        "items": loaded.sha256,
        "model": identity,
        "settings": settings,
    }
    rows = _resumable(log, header)
    if task.kind == "program":
        return evaluate_programs(model, tokenizer, loaded, mode, config, log, rows, on_items)
    size = official.batch_size(task.kind) if mode == "official" else 1
    rows = rows[: len(rows) // size * size] if len(rows) < len(loaded.items) else rows
    same = _same_prompts(loaded, mode)
    rows = [row | same.get(row["i"], {}) for row in rows]
    write_lines(log, [header, *rows])
    for batch in _samples(model, tokenizer, task, loaded.items[len(rows) :], mode, config):
        fresh = [
            {"i": loaded.places[i], "group": loaded.items[i].group, **sample, **same.get(loaded.places[i], {})}
            for i, sample in enumerate(batch, len(rows))
        ]
        append_lines(log, fresh)
        rows += fresh
        if on_items:
            on_items(f"{task.name} ({mode})", len(rows), len(loaded.items))
    return summarise(task.name, mode, task.kind, as_counted(rows), config.eval.max_error_rate, loaded.sha256)


def evaluate_all(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    config: Config,
    folder: Path,
    identity: str,
    on_items: OnItems | None = None,
) -> list[Score]:
    """Evaluate every task in every mode of the settings; solutions have no official mode."""
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
