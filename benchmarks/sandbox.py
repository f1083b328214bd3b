"""Time what the sandbox adds to running a program.

    python benchmarks/sandbox.py [--repeats 20]

Runs the same small program with this Python directly and in the sandbox, alternating, and prints medians and
their difference a program.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from fedtune.evaluation import sandbox

PROGRAM = "def f(x):\n    return x + 1\nassert f(1) == 2\n"


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    bare: list[float] = []
    boxed: list[float] = []
    for _ in range(repeats):
        bare.append(_seconds(lambda: subprocess.run([sys.executable, "-B", "-c", PROGRAM], check=True)))
        boxed.append(_seconds(lambda: sandbox.execute(PROGRAM, sandbox.PYTHON)))
    one, two = statistics.median(bare), statistics.median(boxed)
    print(f"{sandbox.engine()}: bare {one:.3f} s, in the sandbox {two:.3f} s, difference {two - one:.3f} s a program")


if __name__ == "__main__":
    main()
