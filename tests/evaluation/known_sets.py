"""Measure the whole sets that are at hand: `python -m tests.evaluation.known_sets` writes the package's table of hashes.

Sets that are not at hand here (no package, no FEDTUNE_DATA) keep the hashes they have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fedtune.evaluation
from fedtune.domains import DOMAINS
from fedtune.domains.base import Item, Task
from fedtune.evaluation import items, scorers
from fedtune.evaluation.known import samples_sha256, sets
from fedtune.settings import load as load_settings
from fedtune.types import FedtuneError

TABLE = Path(fedtune.evaluation.__file__).parent / "known_sets.json"


def whole(domain: str, task: Task) -> tuple[Item, ...]:
    """Return all items of a set, from its package or from the folder of third-party data."""
    source = {"source": "packaged"} if task.packaged else {"source": "folder", "path": os.environ["FEDTUNE_DATA"]}
    return items.load(task, load_settings([{"domain": domain, "data": source}]).config, 0).items


def hashes(task: Task, found: tuple[Item, ...]) -> dict[str, str]:
    """Return a set's hashes by mode, made from its items and not from any log."""
    last = {item.prompt: i for i, item in enumerate(found)}
    # nothing can be right or wrong of a solution: its log has no answer
    golds = ["" if task.kind == "solution" else item.gold_answer for item in found]
    rows = [{"i": i, "group": item.group, "gold": golds[i]} for i, item in enumerate(found)]
    merged = [
        r if last[item.prompt] == r["i"] else {**r, "same_prompt_as": last[item.prompt]}
        for r, item in zip(rows, found, strict=True)
    ]
    made = {"any": samples_sha256(rows, scorers.one_of(task).key)}
    if task.kind in ("choice", "boolean"):
        made["official"] = samples_sha256(merged, scorers.one_of(task).key)
    return made if made.get("official") != made["any"] else {"any": made["any"]}


def measured() -> Iterator[tuple[Task, tuple[Item, ...]]]:
    """Yield every set that is at hand, with its items."""
    for domain in DOMAINS.values():
        for task in (*domain.tasks, *domain.packaged_tasks):
            if task.packaged or "FEDTUNE_DATA" in os.environ:
                try:
                    yield task, whole(domain.name, task)
                except FedtuneError:
                    continue


if __name__ == "__main__":
    table = dict(sets())
    for task, found in measured():
        old = table.get(task.name, {})
        table[task.name] = {mode: sorted({*old.get(mode, []), sha}) for mode, sha in hashes(task, found).items()}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
