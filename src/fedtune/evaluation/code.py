"""Evaluate a model on programs: generate a batch, run it in the sandbox, write it down, go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedtune.config import Config
from fedtune.evaluation import programs, sandbox
from fedtune.evaluation.generate import BATCH, Decoding, complete
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.retry import Failed, batches
from fedtune.io import append_lines
from fedtune.results.schema import Score

TEMPERATURE, TOP_P = 0.2, 0.95  # of the official evaluation
Sample = dict[str, Any]


def decoding(loaded: TaskItems, mode: str, config: Config) -> Decoding:
    """Return how completions are made: greedy, or as the official evaluation samples them."""
    if mode == "official":
        return Decoding(TEMPERATURE, TOP_P, length=loaded.task.length)
    return Decoding(length=loaded.task.length, new_tokens=config.eval.max_new_tokens)


def unavailable(loaded: TaskItems) -> str:
    """Say why this task's language cannot be run here, or return an empty string.

    Raises:
        SandboxError: there is no sandbox at all; nothing is generated for nothing.
    """
    if sandbox.engine() is None:
        raise sandbox.SandboxError(
            f"{loaded.task.name}: no sandbox works on this machine: {sandbox.MISSING}. "
            'Without one: -s eval.tasks=["algorithms-solutions"]'
        )
    try:
        sandbox.require(sandbox_language(loaded))
    except sandbox.SandboxError as err:
        return str(err)
    return ""


def sandbox_language(loaded: TaskItems) -> sandbox.Language:
    """Return the language of a task's programs."""
    return programs.LANGUAGES[loaded.task.language]


@contextlib.contextmanager
def _precision(model: Any, mode: str) -> Iterator[None]:
    """Generate in float32 in official mode, as the leaderboard's harness does, and give the weights back after.

    A quantised base stays as it is: its weights exist in no other form here.
    """
    halves = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)] if mode == "official" else []
    kinds = [p.dtype for p in halves]
    for parameter in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, kind in zip(halves, kinds, strict=True):
            parameter.data = parameter.data.to(kind)


def _run_batch(loaded: TaskItems, start: int, completions: Sequence[Sequence[str]]) -> list[Sample]:
    """Run a batch's programs and return its rows."""
    items = loaded.items[start : start + len(completions)]
    written = [[item.prompt + text for text in texts] for item, texts in zip(items, completions, strict=True)]
    flat = [program for samples in written for program in samples]
    tests = [item.gold_answer for item, samples in zip(items, written, strict=True) for _ in samples]
    rows = programs.outcome_rows(written, programs.run(flat, tests, loaded.task.language))
    for offset, (item, samples, row) in enumerate(zip(items, written, rows, strict=True)):
        passed = [o["kind"] == "passed" for o in row["outcomes"]]
        known = {"i": loaded.places[start + offset], "group": item.group, "programs": samples}
        row.update(known, correct=passed[0], value=sum(passed) / len(passed))
    return rows


def _rows(loaded: TaskItems, start: int, made: Sequence[Any], samples: int) -> list[Sample]:
    """Return a batch's rows; where generating raised, the program is the prompt alone, and the row says why."""
    texts = [[""] * samples if isinstance(each, Failed) else each for each in made]
    rows = _run_batch(loaded, start, texts)
    for row, each in zip(rows, made, strict=True):
        if isinstance(each, Failed):
            row["error"] = each.text
    return rows


def evaluate_programs(
    model: Any,
    tokenizer: Any,
    loaded: TaskItems,
    mode: str,
    config: Config,
    log: Path,
    rows: list[Sample],
    on_items: Callable[[str, int, int], None] | None = None,
) -> Score:
    """Generate and run what is missing of a task.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        loaded: the problems.
        mode: `greedy` or `official`.
        config: samples a problem and the greedy limit are used.
        log: the per-sample file; its header is written.
        rows: what it already has.
        on_items: progress.

    Raises:
        SandboxError: no sandbox works here.
    """
    task, samples = loaded.task, config.eval.samples if mode == "official" else 1
    if reason := unavailable(loaded):
        return Score(task=task.name, mode=mode, metric="pass@1", n=len(loaded.items), score=None, withheld=reason)

    def ask(first: int, last: int) -> Iterator[list[list[str]]]:
        prompts = [item.prompt for item in loaded.items[first:last]]
        how, stops = decoding(loaded, mode, config), [task.stop] * len(prompts)
        return complete(model, tokenizer, prompts, stops, how, samples, loaded.places[first:last])

    with _precision(model, mode):
        for batch in batches(ask, len(rows), len(loaded.items), BATCH):
            fresh = _rows(loaded, len(rows), batch, samples)
            append_lines(log, fresh)
            rows += fresh
            if on_items:
                on_items(f"{task.name} ({mode})", len(rows), len(loaded.items))
    return programs.summarise(task.name, mode, rows, samples, loaded.sha256, config.eval.max_error_rate)
