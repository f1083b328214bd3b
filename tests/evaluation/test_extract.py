import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.domains.base import Item
from fedtune.evaluation.extract import official_label
from fedtune.evaluation.scorers import KINDS
from fedtune.evaluation.scorers.questions import Form, Questions


def form(kind: str) -> Form:
    scorer = KINDS[kind]["official"]
    assert isinstance(scorer, Questions)
    return scorer.form


@pytest.mark.parametrize(
    ("output", "kind", "read"),
    [
        ("B", "choice", "b"),
        ("b. second", "choice", "b"),
        ("Based on the text", "choice", "b"),
        ("Answer", "choice", "a"),
        ("The", "choice", "the"),
        ("<", "choice", "<"),
        ("", "choice", ""),
        ("\n", "choice", "\n"),
        ("x\n## C is right\nmore", "choice", "c"),
        ("é D", "choice", "d"),
        ("Yes.", "boolean", "yes"),
        ("yes yes", "boolean", "yes yes"),
        ("yesyes", "boolean", "yes"),
        ("noyes", "boolean", "no"),
        ("yesno", "boolean", "yes"),
        ("maybe", "boolean", "maybe"),
        ("maybe.", "boolean", "maybe."),
        ("A", "boolean", "a"),
    ],
)
def test_the_official_reading_with_its_quirks(output: str, kind: str, read: str) -> None:
    assert form(kind).read(output) == read


def test_maybe_counts_only_as_the_whole_output() -> None:
    maybe = Item("x", "x", ("yes", "no", "maybe"), 2)
    right = [KINDS["boolean"]["official"].sample(maybe, output)["correct"] for output in ("Maybe", "maybe.")]
    assert right == [True, False]


@pytest.mark.parametrize(
    ("output", "label"),
    [
        ("negative", "negative"),
        ("I choose from {negative/neutral/positive}", "positive"),
        ("Positive", "positive"),
        ("POSITIVE", "neutral"),
        ("Negative.", "negative"),
        ("no idea", "neutral"),
        ("", "neutral"),
    ],
)
def test_the_official_sentiment_rule_order(output: str, label: str) -> None:
    assert official_label(output) == label


@pytest.mark.parametrize(
    ("output", "kind", "read"),
    [
        ("B", "choice", "B"),
        (" (b). ", "choice", "B"),
        ("Based", "choice", None),
        ("A B", "choice", None),
        ("I cannot answer that", "choice", None),
        ("", "choice", None),
        ("yes", "boolean", "yes"),
        ("MAYBE!", "boolean", "maybe"),
        ("yes no", "boolean", None),
        ("POSITIVE", "sentiment", "positive"),
        ("negative/neutral/positive", "sentiment", None),
        ("It is neutral.", "sentiment", "neutral"),
    ],
)
def test_strict_counts_clean_answers_only(output: str, kind: str, read: str | None) -> None:
    """No answer, two answers, a refusal, an echo of the options, the wrong case."""
    assert form(kind).strict(output, form(kind).answers or ("A", "B", "C", "D")) == read


@given(st.text())
def test_no_text_breaks_the_readers(text: str) -> None:
    for kind in ("choice", "boolean", "sentiment"):
        form(kind).read(text)
        form(kind).strict(text, ("A", "yes", "neutral"))
