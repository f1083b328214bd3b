"""Published FlowerTune submissions as entries, scored again from their generations: a board starts with real rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from fedtune.board import sets
from fedtune.domains import TASKS
from fedtune.evaluation.published import scored, scorer_of
from fedtune.io import read_json, reading
from fedtune.models.zoo import zoo
from fedtune.results.entry import Answers, Costs, Entry
from fedtune.results.schema import Arm, Score
from fedtune.types import CorruptFileError, nearest, plain

DOMAINS = {"general-nlp": "general"}
TOLERANCE = 1e-9
State = Literal["re-scored", "reported", "flagged"]
WORSE: tuple[State, ...] = ("re-scored", "reported", "flagged")
OnTask = Callable[[str], None]


def _judged(item: dict[str, Any], score: Score) -> str:
    """Say how a published score and the one made again differ; an empty string where they agree."""
    if score.score is None or abs(score.score - item["published_score"]) <= TOLERANCE:
        return ""
    return f"{item['task']}: published as {item['published_score']:.6g}, its generations give {score.score:.6g}"


def _remarks(item: dict[str, Any]) -> list[str]:
    claim, task, n = item["published_score"], item["task"], item["n"]
    lines = [f"{task}: published as {claim:.4g} without generations"] if not item["generations_file"] else []
    if not math.isclose(claim * n, round(claim * n), abs_tol=1e-4):
        lines.append(f"{task}: {claim:.4g} is not k/{n} for any whole k")
    return lines


def _costs(facts: dict[str, Any], model: str) -> Costs:
    """Return the bytes a participant's own log says, halved into up and down; it counts both together."""
    for log in facts.get("communication", ()):
        if log["model"] == model:
            total = round(log["used_mb_max"] * 1024**2)
            return Costs(bytes_up=total // 2, bytes_down=total - total // 2)
    return Costs()


def _entry(root: Path, items: list[dict[str, Any]], facts: dict[str, Any], on_task: OnTask) -> Entry:
    first = items[0]
    scores, answers, reasons, unranked = [], {}, [], []
    worst: State = "re-scored"
    for item in items:
        reasons += _remarks(item)
        if not item["generations_file"]:
            continue
        on_task(f"{first['participant']} {item['task']}")
        tests = item.get("references_file") if scorer_of(item["task"]).needs_tests else None
        file, references = root / item["generations_file"], root / tests if tests else None
        score, right, lacks = scored(item["task"], file, "official", references, as_asked=False)
        unranked += [plain(f"{item['task']}: {lacks}", sets.MOST)] if lacks else []
        if lacks and scorer_of(item["task"]).needs_tests:
            worst = max(worst, "reported", key=WORSE.index)  # by tests that nobody here knows
        scores.append(score)
        answers[f"federated/{score.key}"] = Answers.pack(right, score.items_sha256)
        if problem := _judged(item, score):
            reasons.append(problem)
            worst = "flagged"
    if not scores:
        raise CorruptFileError(f"{root}: {first['participant']} has no generations for {first['domain']}")
    base, domain = zoo().get(first["model"]), DOMAINS.get(first["domain"], first["domain"])
    named = "not stated" not in first["model"]
    return Entry(
        kind="published",
        team=first["participant"],
        title=f"published submission {first.get('run') or ''}".strip(),
        link=f"https://{facts['repo']}" if facts.get("repo") else "",
        state=worst,
        reasons=reasons + ([] if named else ["the files do not say which base model they are of"]),
        domain=domain,
        base=first["model"] if named else "not stated",
        base_millions=base.parameters if base else None,
        method="not stated",
        protocol="flowertune-leaderboard",
        unranked=[*unranked, *sets.missing_tasks(domain, scores)],
        arms=[Arm(name="federated", scores=scores)],
        answers=answers,
        costs=_costs(facts, first["model"]),
        claims={item["task"]: item["published_score"] for item in items},
        code={"commit": facts.get("commit")},
    )


def _check_once(root: Path, items: Sequence[dict[str, Any]]) -> None:
    """Make sure a run has known tasks, each once: two runs in one row would be an average of nothing."""
    names = [item["task"] for item in items]
    if unknown := next((n for n in names if n not in TASKS), ""):
        raise CorruptFileError(f"{root / 'index.json'}: unknown task {unknown!r:.60}; {nearest(str(unknown), TASKS)}")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        who = f"{items[0]['participant']}, {items[0]['domain']}, {items[0]['model']}"
        raise CorruptFileError(
            f"{root / 'index.json'}: {who} has {', '.join(twice)} twice; tell its runs apart by `run`"
        )


def read(root: Path, on_task: OnTask = lambda what: None, skipped: Sequence[str] = ()) -> Iterator[Entry]:
    """Yield an entry for each participant, domain, base model and run of a folder of published files.

    Args:
        root: the folder; `index.json` lists task, model, run, generations, references, published score and n.
        on_task: called before each task, for programs take a while.
        skipped: domains to leave out, by the names in the index.

    Raises:
        CorruptFileError: no index, or a file that cannot be read.
        SandboxError: programs cannot be run here.
    """
    index = read_json(root / "index.json")
    if not isinstance(index, list) or not index:
        raise CorruptFileError(f"{root / 'index.json'}: is not a list of published files")
    facts = read_json(root / "facts.json") if (root / "facts.json").exists() else {}

    def group(item: dict[str, Any]) -> tuple[str, ...]:
        return item["participant"], item["domain"], item["model"], str(item.get("run") or "")

    with reading(f"{root / 'index.json'} or facts.json"):
        for (participant, *_), items in groupby(sorted(index, key=group), key=group):
            listed = list(items)
            _check_once(root, listed)
            if listed[0]["domain"] not in skipped:
                yield _entry(root, listed, facts.get(participant, {}), on_task)
