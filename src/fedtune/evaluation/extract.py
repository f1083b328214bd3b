"""How FlowerTune asks, and what it reads in an answer, bit-compatible; a strict reading beside it. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable

_READABLE = frozenset({"a", "b", "c", "d", "e", "yes", "no"})
_FOLDS = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))
ANSWER_MARK = "Answer: "


def wrap(prompt: str) -> str:
    """Wrap a question's prompt as the official evaluation does, ChatML-like; sentiment prompts stay as they are."""
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


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


def _official(output: str, shorten: Callable[[str], str]) -> str:
    """Return what FlowerTune's `format_answer` reads in an output.

    What cannot be read is the whole lower-cased output, which then equals the gold answer only if it is exactly that
    (so "maybe" counts, and "maybe." does not).
    """
    raw = output.lower()
    text = raw
    if "\n##" in text:
        text = text.split("\n##")[1].split("\n")[0].strip().lower()
    text = shorten(_squeeze(text))
    return text if text in _READABLE else raw


def official_letter(output: str) -> str:
    """Return what is read of multiple choice: the first letter counts, so "Based on" is b."""
    return _official(output, lambda text: text[:1])


def official_verdict(output: str) -> str:
    """Return what is read of yes, no, maybe, the first doubled one folded."""
    return _official(output, _fold)


def bare(output: str) -> str:
    """Return an output without its case and punctuation, as `strict_word` holds it against letters and verdicts."""
    return _squeeze(output).lower()


def strict_word(output: str, answers: tuple[str, ...]) -> str | None:
    """Return the letter or verdict that is the whole output but for case, space and punctuation, else None."""
    word = bare(output)
    return next((a for a in answers if a.lower() == word), None)


def strict_label(output: str, answers: tuple[str, ...]) -> str | None:
    """Return the one of some words that occurs in an output alone, else None."""
    found = {w for w in re.findall(r"[a-z]+", output.lower()) if w in answers}
    return found.pop() if len(found) == 1 else None
