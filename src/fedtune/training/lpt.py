"""Which worker does which task: the longest processing time first (Graham 1969), at most 4/3 of the best schedule."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def order(costs: Sequence[float]) -> list[int]:
    """Return the places of tasks, the costliest first; equal ones stay in order."""
    return sorted(range(len(costs)), key=lambda i: (-costs[i], i))


def assign(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Return for each worker the places of its tasks: each next-costly task goes to the worker that is free first.

    Args:
        costs: of each task, in any unit.
        workers: 1 or more.
    """
    loads = [(0.0, worker) for worker in range(workers)]
    tasks: list[list[int]] = [[] for _ in range(workers)]
    for place in order(costs):
        load, worker = heapq.heappop(loads)
        tasks[worker].append(place)
        heapq.heappush(loads, (load + costs[place], worker))
    return tasks
