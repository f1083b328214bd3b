"""Published FlowerTune submissions as entries, scored again from their generations: a board starts with real rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fedtune.domains import TASKS
from fedtune.evaluation import published
from fedtune.evaluation.programs import score_published
from fedtune.io import read_json
from fedtune.models.zoo import zoo
from fedtune.results.entry import Answers, Costs, Entry
from fedtune.results.schema import Arm, Score
from fedtune.types import CorruptFileError

DOMAINS = {"general-nlp": "general"}
TOLERANCE = 1e-9
OnTask = Callable[[str], None]


def _impossible(claim: float, n: int) -> str:
    hits = claim * n
    return "" if math.isclose(hits, round(hits), abs_tol=1e-4) else f"{claim:.4g} is not k/{n} for any whole k"


def _again(root: Path, item: dict[str, Any]) -> tuple[Score, list[bool]]:
    """Score one file of generations again, and tell which items are right; programs run in the sandbox."""
    task, path = TASKS[item["task"]], root / item["generations_file"]
    if task.kind == "program":
        references = root / item["references_file"] if item.get("references_file") else None
        score, rows = score_published(task, path, references)
        return score, [all(o["kind"] == "passed" for o in r["outcomes"]) for r in rows]
    score = published.score(task.name, path, "official")
    return score, [bool(s["correct"]) for s in published.read(path, task.kind)]


def _judged(item: dict[str, Any], score: Score) -> str:
    """Say how a published score and the one made again differ; an empty string where they agree."""
    if score.score is None or abs(score.score - item["published_score"]) <= TOLERANCE:
        return ""
    return f"{item['task']}: published as {item['published_score']:.6g}, its generations give {score.score:.6g}"


def _remarks(item: dict[str, Any]) -> list[str]:
    claim, task, n = item["published_score"], item["task"], item["n"]
    why = _impossible(claim, n)
    lines = [f"{task}: published as {claim:.4g} without generations"] if not item["generations_file"] else []
    return lines + ([f"{task}: {why}"] if why else [])


def _costs(facts: dict[str, Any], model: str) -> Costs:
    """Return the bytes a participant's own log says, halved into up and down; it counts both together."""
    for log in facts.get("communication", ()):
        if log["model"] == model:
            total = round(log["used_mb_max"] * 1024**2)
            return Costs(bytes_up=total // 2, bytes_down=total - total // 2)
    return Costs()


def _entry(root: Path, items: list[dict[str, Any]], facts: dict[str, Any], on_task: OnTask) -> Entry:
    first = items[0]
    scores, answers, reasons, worst = [], {}, [], "re-scored"
    for item in items:
        reasons += _remarks(item)
        if not item["generations_file"]:
            continue
        on_task(f"{first['participant']} {item['task']}")
        score, right = _again(root, item)
        scores.append(score)
        answers[f"federated/{score.task}/{score.mode}"] = Answers.pack(right, score.items_sha256)
        if odd := _judged(item, score):
            reasons.append(odd)
            worst = "flagged"
    if not scores:
        raise CorruptFileError(f"{root}: {first['participant']} has no generations for {first['domain']}")
    known = zoo().get(first["model"])
    named = "not stated" not in first["model"]
    return Entry(
        kind="published",
        team=first["participant"],
        title="published submission",
        link=f"https://{facts['repo']}" if facts.get("repo") else "",
        state="flagged" if worst == "flagged" else "re-scored",
        reasons=reasons + ([] if named else ["the files do not say which base model they are of"]),
        domain=DOMAINS.get(first["domain"], first["domain"]),
        base=first["model"] if named else "not stated",
        base_millions=known.parameters if known else None,
        method="not stated",
        protocol="flowertune-leaderboard",
        unranked=["some of the domain's tasks have no generations"] if len(scores) < len(items) else [],
        arms=[Arm(name="federated", scores=scores)],
        answers=answers,
        costs=_costs(facts, first["model"]),
        claims={item["task"]: item["published_score"] for item in items},
        code={"commit": facts.get("commit")},
    )


def read(root: Path, on_task: OnTask = lambda what: None, skipped: Sequence[str] = ()) -> Iterator[Entry]:
    """Yield an entry for each participant and domain of a folder with an `index.json` of published files.

    Args:
        root: the folder; `index.json` lists task, model, generations, references, published score and n.
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

    def group(item: dict[str, Any]) -> tuple[str, str, str]:
        return item["participant"], item["domain"], item["model"]

    try:
        for (participant, _, _), items in groupby(sorted(index, key=group), key=group):
            listed = list(items)
            if listed[0]["domain"] not in skipped:
                yield _entry(root, listed, facts.get(participant, {}), on_task)
    except KeyError as err:
        raise CorruptFileError(f"{root / 'index.json'}: an entry lacks {err}, or names an unknown task") from err
