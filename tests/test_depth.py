"""Settings are parsed in a time that grows with their length."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.depth import parsed


@pytest.mark.parametrize("text", ["a" * 300_000, "a-" * 200_000, "a.b " * 100_000])
def test_a_text_of_very_long_words_is_refused_or_read(text: str) -> None:
    assert parsed(f"{text[:-1].split('.')[0].strip()} = 1") != {}
    with pytest.raises(ValueError, match="Expected"):
        parsed(text)


def test_a_key_of_too_many_parts_is_named_from_its_beginning() -> None:
    assert parsed("long-word.b.c.d.e.f.g.h = 1")["long-word"]["b"] != {}
    with pytest.raises(ValueError, match=r"the key long-word\.b\.c\.d\.e\.f\.g\.h\.\.\.\. has more than 8 parts"):
        parsed("x = 1\nlong-word.b.c.d.e.f.g.h.i = 1")


DEEP = "{" + ".".join("b" * 9) + " = 1}"
# what texts begin and end with, may hold, and may hide
PIECES = ["'", '"', "'''", '"""', "\\", "\\\\", "#", "\n", " ", ".", "x", "a.b.c.d.e.f.g.h.i", ","]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["'", '"', "'''", '"""']), st.lists(st.sampled_from(PIECES), max_size=6), st.integers(0, 3))
def test_no_text_hides_a_key_nor_is_taken_for_one(quote: str, inside: list[str], more: int) -> None:
    text = quote + "".join(inside) + quote + quote[0] * more
    try:
        made = tomllib.loads(f"a = [{text}, {DEEP}]\n# {quote}\n")["a"]
    except ValueError:
        made = []
    if made and isinstance(made[-1], dict):
        with pytest.raises(ValueError, match="more than 8 parts"):
            parsed(f"a = [{text}, {DEEP}]\n# {quote}\n")
    elif made:
        assert parsed(f"a = [{text}, {DEEP}]\n# {quote}\n")["a"] == made
    try:
        made = tomllib.loads(f"a = {text}\nb = 1\n")
    except ValueError:
        return
    assert parsed(f"a = {text}\nb = 1\n") == made


@pytest.mark.parametrize("quotes", ["'''x''''", "'''x'''''", '"""x""""', '"""x"""""', "''''''''", '""""""""'])
def test_quotes_before_the_closing_ones_hide_no_key(quotes: str) -> None:
    assert len(tomllib.loads(f"a = [{quotes}, {DEEP}]")["a"]) == 2
    with pytest.raises(ValueError, match="more than 8 parts"):
        parsed(f"a = [{quotes}, {DEEP}]")


@pytest.mark.parametrize("end", ["\\", '\\"\\', "x", ""])
@pytest.mark.parametrize("quote", ['"', '"""'])
def test_a_text_of_escaped_quotes_without_end_is_gone_through_once(quote: str, end: str) -> None:
    """From every quote to the end it would be hours."""
    with pytest.raises(ValueError, match=r"Unterminated|Expected|[Ii]llegal|[Uu]nescaped|Invalid"):
        parsed(f"a = {quote}" + '\\"' * 250_000 + end)
