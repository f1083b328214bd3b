"""Whatever stands in a submission is shown as letters: by the card, the report, and what Markdown is made of it."""

import html
import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import ValidationError

from fedtune.board import card, report
from fedtune.results.entry import Entry, escape_markdown
from fedtune.results.schema import Arm
from tests.board.entries import entry, score

HOSTILE = (
    "![x](https://evil.example/track.png) [y](javascript:alert(1)) <img src=x onerror=alert(1)> `z` **b** | c\n# d"
)


def hostile() -> Entry:
    """Return an entry past its own checks, with such a text wherever a text may be."""
    texts: dict[str, Any] = dict.fromkeys(("domain", "base", "method", "protocol"), HOSTILE)
    bad = score(120).model_copy(update={"task": HOSTILE, "mode": HOSTILE, "score": None, "withheld": HOSTILE})
    made = {**dict(entry(0)), **texts, "arms": [Arm(name="base", scores=[bad]), Arm(name="federated", scores=[bad])]}
    made |= {"data": {"name": HOSTILE, "sha256": HOSTILE, "clients": [1]}, "unranked": [HOSTILE]}
    return Entry.model_construct(**{**made, "versions": {"fedtune": HOSTILE}, "code": {"commit": HOSTILE}})


def markup(text: str) -> list[str]:
    """Return what Markdown would make of a text that is more than letters."""
    found = re.findall(r"(?<!\\)!?(?<!\\)\[[^\]]*(?<!\\)\]\([^)]*\)|(?<!\\)<[a-z][^>]*>|(?<!\\)`", text)
    return [f for f in found if f != "`"]


def test_the_hostile_text_is_markup() -> None:
    assert len(markup(HOSTILE)) == 3
    assert markup(escape_markdown(HOSTILE)) == []
    assert "\n" not in escape_markdown(HOSTILE)


WORDS = [
    "_",
    "__",
    "#",
    "# ",
    "!",
    "$",
    "`",
    "*",
    "~~",
    "[",
    "](x)",
    "<b>",
    "&lt;",
    "|",
    "\\",
    "- ",
    "1. ",
    "=",
    "+ ",
    ":",
]
WORDS += ["https://", "www.", "WWW.x.org", "@", "#1", "GH-", "mailto:", ":smile:", "a", "7", " ", "\n", "---", ")"]


@given(st.lists(st.sampled_from(WORDS), max_size=8).map("".join))
@example("__base__ _x_ https://evil.example/a www.evil.example @admin a@b.org #1 :smile: $x$ (GH-26)")
@example("1. x")
@example("- x")
@example("mailto:_")
@example("#_")
def test_any_text_is_shown_as_it_is_and_linked_by_nobody(text: str) -> None:
    made = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(escape_markdown(text)).strip()
    shown = html.unescape(re.sub(r"^<p>|</p>$", "", made))
    assert shown.replace("\u200b", "") == " ".join(text.split())
    assert not re.search(r"://|www\.|@\S|#\w|:\w+:|mailto:\w|GH-\d", re.sub("\u200b", " ", shown), re.I)


def test_a_report_shows_letters() -> None:
    made = report.markdown(hostile())
    assert markup(made) == []
    assert not re.search(r"(?m)^# d", made)
    page = report.page(hostile())
    assert "<img" not in page
    assert 'href="javascript' not in page


def test_a_card_shows_letters() -> None:
    made = card.model_card(hostile())
    assert markup(made.split("\n---\n", 1)[1]) == []
    json.dumps(card.lm_eval(hostile()))


@pytest.mark.parametrize("field", ["team", "title", "base", "method"])
@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\tb", "a\x9bb", "a\u200eb", "a\u2028b", "a\ufeffb", "a\ud800b"])
def test_what_breaks_a_line_or_shows_nothing_is_refused(field: str, text: str) -> None:
    with pytest.raises(ValidationError):
        entry(0, **{field: text})


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", "data:text/html,x", "http://x", 'https://x"y', "https://x y", "//x"]
)
def test_a_link_is_https_and_nothing_else(link: str) -> None:
    with pytest.raises(ValidationError):
        entry(0, link=link)
