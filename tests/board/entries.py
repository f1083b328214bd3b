"""Made-up entries, as a run or a participant might leave them."""

from __future__ import annotations

import random
from typing import Any

from fedtune.results.entry import Answers, Costs, Entry, Point
from fedtune.results.schema import Arm, Score

BASES = [
    ("Qwen/Qwen2.5-0.5B-Instruct", 494.0),
    ("meta-llama/Llama-3.2-1B-Instruct", 1236.0),
    ("mistralai/Mistral-7B", 7242.0),
]
METHODS = ["fedit", "ffa_lora", "flexlora", "flora"]


def score(right: int, n: int = 200, task: str = "fpb", mode: str = "likelihood") -> Score:
    return Score(
        task=task,
        mode=mode,
        n=n,
        score=right / n,
        interval=(max(0.0, right / n - 0.05), min(1.0, right / n + 0.05)),
        strict=right / n,
        valid_rate=1.0,
        trivial={"majority": 0.5},
        items_sha256="i" * 64,
    )


def entry(number: int = 0, right: int = 120, **changes: Any) -> Entry:
    """Return an entry of a made-up run; the right items are the first ones."""
    base, millions = BASES[number % 3]
    flags = [i < right for i in range(200)]
    fields: dict[str, Any] = {
        "team": f"team {number}",
        "title": f"run {number}",
        "domain": "finance",
        "base": base,
        "revision": "r" * 40,
        "base_millions": millions,
        "method": METHODS[number % 4],
        "seed": 1,
        "config": {"lora": {"r": (8, 16)[number % 2], "dora": False}, "data": {"partition": "iid"}},
        "config_sha256": f"{number:016x}" + "0" * 48,
        "protocol": "corrected",
        "arms": [Arm(name="base", scores=[score(90)]), Arm(name="federated", scores=[score(right)])],
        "answers": {"federated/fpb/likelihood": Answers.pack(flags, "i" * 64)},
        "curve": [Point(round=r, task="fpb", mode="likelihood", score=0.4 + r / 50) for r in (2, 4, 6)],
        "losses": [2.0, 1.5, 1.2, 1.1],
        "rounds": 4,
        "costs": Costs(bytes_up=10**6 * (number + 1), bytes_down=10**6, wall_seconds=60.0 + number),
        "state": "re-scored",
    }
    return Entry.model_validate({**fields, **changes})


def many(count: int) -> list[Entry]:
    """Return a number of different entries over four domains."""
    generator = random.Random(1)
    domains = ["general", "finance", "medical", "code"]
    return [entry(i, generator.randrange(60, 180), domain=domains[i % 4]) for i in range(count)]
