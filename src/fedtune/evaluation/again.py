"""Programs of somebody else's log, run again with the tests of the known set, never with tests that came along.

Programs of a published file are run with those that came along only where the known set's cannot be had, or where
that is asked for; and that is said.

The programs are hostile: they only ever run in the sandbox, which bounds each one's time, memory and output. How many
there are, how long each may be, and how long all of a submission may take is bounded here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fedtune.config import Config
from fedtune.config.rows import DataSettings
from fedtune.domains import DOMAINS
from fedtune.domains.base import Item, Task
from fedtune.evaluation import items, programs, sandbox
from fedtune.types import FedtuneError

MAX_PROGRAMS, MAX_CHARS = 20_000, 200_000
SECONDS = 1_800.0  # of the clock, for all programs of a submission
BATCH = 32
ENOUGH = 20  # programs that do not pass as they are said to: what comes after them is not run
Sample = Mapping[str, Any]


@dataclass
class _Time:
    """The seconds in which all programs of a submission must end; only running them counts."""

    left: float = SECONDS


_TIME: ContextVar[_Time | None] = ContextVar("_TIME", default=None)


@contextlib.contextmanager
def one_submission() -> Iterator[None]:
    """Give all programs that are run again inside this block one budget of seconds together."""
    token = _TIME.set(_Time())
    try:
        yield
    finally:
        _TIME.reset(token)


def _run(texts: Sequence[str], tests: Sequence[str], language: str) -> list[sandbox.Outcome]:
    """Run programs within what is left; those not begun when nothing is left are never begun."""
    budget, began = _TIME.get() or _Time(), time.monotonic()

    def check(_: int = 0) -> None:
        if time.monotonic() - began >= budget.left:
            most = f"at most {SECONDS:,.0f} seconds are given to all programs of a submission"
            raise FedtuneError(f"they have not ended in time; {most}")

    check()
    try:
        return programs.run(texts, tests, language, check)
    finally:
        budget.left -= time.monotonic() - began


def tests_at_hand(task: Task) -> tuple[Item, ...]:
    """Return the whole set of a program task: from its package, the folder in FEDTUNE_DATA, or the Hub.

    Raises:
        FedtuneError: it cannot be had.
    """
    folder = os.environ.get("FEDTUNE_DATA", "")
    elsewhere = DataSettings(source="folder", path=folder) if folder else DataSettings(source="hub")
    domain = next(d.name for d in DOMAINS.values() if task in (*d.tasks, *d.packaged_tasks))
    settings = Config(domain=domain, data=DataSettings() if task.packaged else elsewhere)
    return items.load(task, settings, 0).items


@functools.cache
def unable(task: Task) -> str:
    """Say why a task's programs cannot be run again here, or return an empty string.

    Asked once in a process: what was not run for a reason that is gone a moment later was still not run.
    """
    try:
        why = sandbox.lacking(programs.LANGUAGES[task.language])
        if not why:
            tests_at_hand(task)
    except FedtuneError as err:
        return str(err)
    return why


def too_much(rows: Sequence[Sample]) -> str:
    """Say why a log holds more than will be run, or return an empty string."""
    texts = [text for row in rows for text in row["programs"]]
    if len(texts) > MAX_PROGRAMS:
        return f"{len(texts):,} programs, at most {MAX_PROGRAMS:,} are run"
    longest = max(map(len, texts), default=0)
    return f"a program of {longest:,} characters, at most {MAX_CHARS:,} are run" if longest > MAX_CHARS else ""


def failing(task: Task, rows: Sequence[Sample], tests: Mapping[int, str] | None = None) -> Iterator[tuple[int, str]]:
    """Yield (item, outcome) of programs that are said to pass and do not, up to `ENOUGH`.

    Only what is said to pass is run: nothing else adds to a score. One that fails is run once more, alone, for a busy
    machine is no proof.

    Args:
        tests: by the items' places; those of the whole known set by default.

    Raises:
        FedtuneError: no sandbox, no tool, or no tests; or the programs have not ended in the time for all of them.
    """
    known = {i: item.gold_answer for i, item in enumerate(tests_at_hand(task))} if tests is None else tests
    found = 0
    claimed = [
        (row["i"], text)
        for row in rows
        for text, outcome in zip(row["programs"], row["outcomes"], strict=True)
        if outcome["kind"] == "passed"
    ]
    if strange := [i for i, _ in claimed if i not in known]:
        yield strange[0], "is no item of the set"
        return
    for start in range(0, len(claimed), BATCH):
        part = claimed[start : start + BATCH]
        first = _run([text for _, text in part], [known[i] for i, _ in part], task.language)
        for (i, text), outcome in zip(part, first, strict=True):
            if outcome.kind != "passed":
                (second,) = _run([text], [known[i]], task.language)
                if second.kind != "passed":
                    found += 1
                    yield i, second.kind
                if found >= ENOUGH:
                    return


def tests_of_the_set(task: Task, count: int) -> tuple[list[str], str]:
    """Return each problem's tests of the known set; none, and why, where so many problems are not held against it."""
    if count != task.n:
        return [], f"{count:,} items, the whole set has {task.n:,}"
    beside = "run with the tests published beside them"
    try:
        tests = [item.gold_answer for item in tests_at_hand(task)]
    except FedtuneError as err:
        return [], f"{beside}; those of the set are not at hand: {err}"
    return tests, "" if len(tests) == count else f"the set at hand has another number of problems; {beside}"
