"""What the machine has and how fast it multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

# 16 bits lose digits, so they have to be worth it
WORTH_16_BITS = 1.5


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free: on the GPU, or of this machine and the control group it runs in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        known.append(max(0, limit - used))
    return min(known, default=4 * 1024**3)


def gemm_rate(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device, seconds: float = 0.05
) -> float:
    """Return the operations a second of x [rows, inner] times W^T [inner, columns], the best of some."""
    x, weight = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, started = float("inf"), time.perf_counter()
    torch.nn.functional.linear(x, weight)
    while time.perf_counter() - started < seconds or best == float("inf"):
        wait()
        before = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        wait()
        best = min(best, time.perf_counter() - before)
    return 2 * rows * inner * columns / best


@cache
def best_dtype(device: str) -> torch.dtype:
    """Return bfloat16 where products are clearly faster in it, else float32; measured once a process.

    A CPU without matrix units for 16 bits multiplies slower in them, often several times.
    """
    where = torch.device(device)
    rates = [gemm_rate(512, 1024, 1024, dtype, where) for dtype in (torch.float32, torch.bfloat16)]
    return torch.bfloat16 if rates[1] >= WORTH_16_BITS * rates[0] else torch.float32
