"""Settings are parsed in a time that grows with their length."""

import pytest

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
