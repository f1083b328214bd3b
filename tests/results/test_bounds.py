"""What may stand in an entry is looked at in a time that grows with the entry, and what may not is named."""

from hypothesis import example, given
from hypothesis import strategies as st

from fedtune.results.bounds import MOST_REASON, as_reason, plain_text, unbounded


def test_the_first_value_that_no_page_shows_is_named_by_its_place() -> None:
    assert unbounded({"a": [1, {"b": float("inf")}]}) == "a.1.b: is inf, at most 1e+100 is taken"
    assert unbounded({"a": {"bits": "x" * 10_001}}) == ""
    assert unbounded({"a": {"bitz": "x" * 10_001}}).startswith("a.bitz: has 10,001 characters")


def test_long_names_are_not_written_out_for_each_value_below_them() -> None:
    tree: object = [*[1] * 100, float("inf")]
    for _ in range(8):
        tree = {"n" * 10_000: tree}
    place, _, what = unbounded(tree).rpartition(": ")
    assert (place.endswith("n.100"), len(place) < 1000, what) == (True, True, "is inf, at most 1e+100 is taken")


@given(st.text())
@example("config.a: 1 -> 2")
@example("prompt.template is '<|user|>\x1b[2J\u200b\ufeff'")
@example("x" * 10_000)
@example("\u0645\u06cc\u200c\u200f")
@example("\u0645" * 499 + "\u200c\u0645")
def test_any_text_becomes_a_reason_that_the_page_can_show(text: str) -> None:
    shown = as_reason(text)
    assert plain_text(shown) == shown == as_reason(shown)
    assert not unbounded({"a": shown})
    assert len(shown) <= MOST_REASON


def test_a_reason_is_still_read_as_what_it_was() -> None:
    assert as_reason("config.rounds: 2 -> 3, <user>") == "config.rounds: 2 \u2192 3, \u2039user\u203a"
