"""What an answer is: FlowerTune's official extractor, bit-compatible, and a strict reading beside it. No torch."""

from __future__ import annotations

import re

from fedtune.domains.base import SENTIMENTS, Kind

_READABLE = frozenset({"a", "b", "c", "d", "e", "yes", "no"})
_FOLDS = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))
ANSWER_MARK = "Answer: "


def _squeeze(text: str) -> str:
    return re.sub(" +", " ", re.sub(r"[^a-zA-Z0-9]", " ", text).strip())


def _fold(text: str) -> str:
    """Fold the first doubled verdict that occurs ("yesyes" is yes, "yesno" is yes …)."""
    for doubled, single in _FOLDS:
        if doubled in text:
            return text.replace(doubled, single)
    return text


def official_label(text: str) -> str:
    """Map a sentiment answer: "positive" wins wherever it stands, then "negative"; all else is neutral."""
    if "positive" in text or "Positive" in text:
        return "positive"
    return "negative" if "negative" in text or "Negative" in text else "neutral"


def official_answer(output: str, kind: Kind) -> str:
    """Return what FlowerTune's `format_answer` reads in an output.

    For multiple choice the first letter counts, so "Based on" is b. What cannot be read is the whole
    lower-cased output, which then equals the gold answer only if it is exactly that (so "maybe" counts, and
    "maybe." does not).
    """
    if kind == "sentiment":
        return official_label(output)
    raw = output.lower()
    text = raw
    if "\n##" in text:
        text = text.split("\n##")[1].split("\n")[0].strip().lower()
    text = _squeeze(text)
    if kind == "boolean":
        text = _fold(text)
    text = text.encode("ascii", "ignore").decode("ascii")
    if kind != "boolean":
        text = text[:1]
    return text if text in _READABLE else raw


def official_correct(output: str, gold: str, kind: Kind) -> bool:
    """Tell whether the official evaluation counts an output as right."""
    if kind == "sentiment":
        return official_label(output) == official_label(gold)
    return official_answer(output, kind) == gold.lower()


def bare(output: str) -> str:
    """Return an output without its case and punctuation, as `strict_answer` holds it against letters and verdicts."""
    return _squeeze(output).lower()


def strict_answer(output: str, kind: Kind, answers: tuple[str, ...] | None = None) -> str | None:
    """Return the answer if the output is one, else None.

    A letter or a verdict must be the whole output but for case, space and punctuation; of the sentiment
    words exactly one must occur.
    """
    if kind == "sentiment":
        found = {w for w in re.findall(r"[a-z]+", output.lower()) if w in SENTIMENTS}
        return found.pop() if len(found) == 1 else None
    allowed = answers or (("yes", "no", "maybe") if kind == "boolean" else tuple("ABCDE"))
    word = bare(output)
    return next((a for a in allowed if a.lower() == word), None)
