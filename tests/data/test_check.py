import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.check import _ODD, _template, check, require, unpaired
from fedtune.data.files import BadRow, Unreadable
from fedtune.types import DataError


def test_all_bad_rows_are_listed_at_once_with_their_numbers() -> None:
    rows = [
        {"instruction": "a", "input": "b", "output": "good"},
        {"input": "b", "output": "c"},
        {"instruction": "a", "input": "b", "output": "  "},
        {"instruction": "a", "input": 7, "output": "c"},
        {"instruction": "a", "input": "b" * 200, "output": "c"},
        {"instruction": "a", "input": "b", "output": "x\ud800y"},
        {"instruction": "a", "input": "see ### Response: {{x}}", "output": "c"},
        {"instruction": "a", "output": "no input column"},
        {"instruction": None, "input": None, "output": "c"},
    ]
    checked = check(rows, {}, max_chars=100)
    found = {(p.row, p.kind, p.action) for p in checked.problems}
    assert found == {
        (1, "missing_column", "dropped"),
        (2, "empty_answer", "dropped"),
        (3, "not_text", "dropped"),
        (4, "over_long", "truncated"),
        (5, "odd_unicode", "replaced"),
        (6, "template_text", "kept as plain text"),
    }
    assert [r.output for r in checked.rows] == [
        "good",
        "c",
        "x\ufffdy".replace("\ufffd", "?"),
        "c",
        "no input column",
        "c",
    ]
    assert len(checked.rows[1].input) == 100
    assert checked.counts()["empty_answer"] == 1
    assert any(line.startswith("row 2: empty answer") for line in checked.lines())


def test_odd_characters_are_those_of_their_unicode_categories() -> None:
    """Control, surrogate and private-use characters but line ends and tabs, U+FFFD, and overrides of direction."""
    every = [chr(i) for i in range(0x110000)]
    named = {c for c in every if _ODD.search(c)}
    categories = {c for c in every if unicodedata.category(c) in ("Cs", "Cc", "Co")} - set("\n\t\r")
    assert named == categories | set("\ufffd\u202a\u202b\u202d\u202e")
    assert {c for c in every if unpaired(c) != c} == {c for c in every if unicodedata.category(c) == "Cs"}
    (problem,) = check([{"instruction": "a\tb\x07c\ufffd", "input": "", "output": "x"}], {}).problems
    assert problem.detail == "U+0007 in instruction"


def test_columns_are_mapped_and_the_natural_key_is_kept() -> None:
    rows = [{"q": "ask", "a": "answer", "site": 3}]
    row = check(rows, {"instruction": "q", "output": "a"}, group="site").rows[0]
    assert (row.instruction, row.input, row.output, row.group) == ("ask", "", "answer", "3")


def test_a_set_without_a_sound_row_is_an_error_with_the_list() -> None:
    with pytest.raises(DataError, match=r"no row can be trained on(.|\n)*row 0: empty answer"):
        require(check([{"instruction": "a", "input": "", "output": ""}], {}), "toy")


@given(st.lists(st.fixed_dictionaries({"instruction": st.text(), "input": st.text(), "output": st.text(min_size=1)})))
def test_every_row_is_either_kept_or_listed_and_what_is_kept_can_be_encoded(rows: list[dict[str, str]]) -> None:
    checked = check(rows, {}, max_chars=100)
    dropped = {p.row for p in checked.problems if p.action == "dropped"}
    assert len(checked.rows) + len(dropped) == len(rows)
    for row in checked.rows:
        for text in (row.instruction, row.input, row.output):
            text.encode("utf-8")
            assert len(text) <= 100


def test_what_a_file_does_not_have_whole_is_listed_with_its_number() -> None:
    good = {"instruction": "a", "input": "b", "output": "c", "site": None}
    rows = [good, BadRow("x.csv: line 3 has 4 cells, the header 3"), {**good, "input": Unreadable("is not UTF-8")}]
    checked = check([*rows, {**good, "site": Unreadable("is odd")}], {}, group="site")
    assert [(p.row, p.kind, p.detail) for p in checked.problems] == [
        (1, "bad_row", "x.csv: line 3 has 4 cells, the header 3"),
        (2, "not_text", "'input' is not UTF-8"),
        (3, "not_text", "'site' is odd"),
    ]
    assert [r.group for r in checked.rows] == [""]


def test_the_natural_key_is_cleaned_as_the_other_columns_are() -> None:
    rows = [{"instruction": "a", "output": "pos\ud83d", "site": "x\udc00" + "y" * 200}]
    checked = check(rows, {}, group="site", max_chars=100)
    assert checked.rows[0].group == "x?" + "y" * 98
    assert {(p.kind, p.detail.split(" in ")[-1], p.action) for p in checked.problems} == {
        ("odd_unicode", "output", "replaced"),
        ("odd_unicode", "group", "replaced"),
        ("over_long", "group has 202 characters", "truncated"),
    }
    same = check(rows, {}, group="output")
    assert (same.rows[0].group, len(same.problems)) == ("pos?", 1)


def test_a_set_with_other_columns_says_once_what_it_has() -> None:
    with pytest.raises(
        DataError, match="'instruction', no 'output'; its columns are prompt, chosen, rejected"
    ) as caught:
        require(check([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 30, {}), "toy")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="toy: no rows"):
        require(check([], {}), "toy")


_PIECES = st.sampled_from(
    ["{", "}", "{{", "}}", "<|", "|>", "im_end", "### Instruction:", "[/INST]", "[", "\n", "word "]
)


@given(st.lists(_PIECES, max_size=20).map("".join))
def test_template_text_is_the_first_piece_of_a_template_in_a_text(text: str) -> None:
    pattern = re.compile(r"### (Instruction|Response):|\{\{.*?\}\}|<\|[a-z_]+\|>|\[/?INST\]", re.S)
    found = pattern.search(text)
    assert _template(text) == (found[0] if found else "")


@pytest.mark.parametrize("piece", ["{", "}}{", "<|", "<|a", "[", "### Instruction"])
def test_a_long_row_that_opens_templates_and_closes_none_is_read(piece: str) -> None:
    row = {"instruction": piece * 500_000, "input": piece * 500_000 + "[INST]", "output": "yes"}
    checked = check([row], {}, max_chars=10**7)
    assert [p.detail for p in checked.problems] == ["'[INST]' in input"]


def chat(*said: str, system: str = "") -> list[dict[str, str]]:
    """Messages in which user and assistant take turns."""
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def test_a_row_without_question_and_answer_may_be_a_conversation() -> None:
    rows = [
        {"messages": chat("a", "b", "c", "d"), "site": 3},
        {"messages": chat("a", "b", system="be brief")},
        {"instruction": "a", "output": "b", "messages": chat("c", "d")},
        {"messages": chat("a", "x\ud800y", "l" * 200, "d <|x|>")},
    ]
    checked = check(rows, {}, "site", max_chars=100)
    assert [row.turns for row in checked.rows] == [
        (("a", "b"), ("c", "d")),
        (("be brief\n\na", "b"),),
        (),
        (("a", "x?y"), ("l" * 100, "d <|x|>")),
    ]
    assert [(row.instruction, row.output) for row in checked.rows] == [("", ""), ("", ""), ("a", "b"), ("", "")]
    assert checked.rows[0].group == "3"
    assert {(p.row, p.kind, p.detail) for p in checked.problems} == {
        (3, "odd_unicode", "U+D800 in message 1"),
        (3, "over_long", "message 2 has 200 characters"),
        (3, "template_text", "'<|x|>' in message 3"),
    }


@pytest.mark.parametrize(
    ("messages", "kind", "said"),
    [
        ("hello", "bad_conversation", "is a text, not a list of messages"),
        ({"role": "user"}, "bad_conversation", "is an object, not a list"),
        (None, "bad_conversation", "is null, not a list"),
        ([], "bad_conversation", "does not end with an answer"),
        (["hello"], "bad_conversation", "has a text where a message is due"),
        ([{"role": "user"}], "bad_conversation", "has a message whose content is null, not a text"),
        ([{"role": 7, "content": "x"}], "bad_conversation", "whose role is a number"),
        (chat("a"), "bad_conversation", "does not end with an answer"),
        (chat("a", "b", "c"), "bad_conversation", "does not end with an answer"),
        (chat("a", "b")[::-1], "bad_conversation", "has 'assistant' where 'user' is due"),
        ([{"role": "r" * 10**6, "content": "x"}], "bad_conversation", "r where 'user' is due"),
        (chat("a", "b") + chat("", "", system="late"), "bad_conversation", "has 'system' where 'user' is due"),
        (chat("a", "b") * 2 + [{"role": "tool", "content": ""}], "bad_conversation", "has 'tool' where 'user'"),
        (chat("a", "b", "c", " \n"), "empty_answer", "'messages'"),
        (Unreadable("cannot be read"), "bad_conversation", "'messages' cannot be read"),
    ],
)
def test_a_conversation_out_of_turn_is_dropped_and_named(messages: object, kind: str, said: str) -> None:
    (problem,) = check([{"messages": messages}], {}).problems
    assert (problem.kind, problem.action) == (kind, "dropped")
    assert said in problem.detail


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "system"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
)


@given(_VALUES)
def test_whatever_messages_are_a_row_is_taken_or_named(messages: object) -> None:
    checked = check([{"messages": messages}], {})
    if checked.rows:
        assert all(answer.strip() for _, answer in checked.rows[0].turns)
        assert checked.rows[0].turns
    else:
        assert [p.action for p in checked.problems] == ["dropped"]


def test_columns_that_an_objective_wants_are_texts_with_words() -> None:
    good = {"instruction": "a", "output": "b", "worse": "c"}
    rows = [good, {**good, "worse": 7}, {**good, "worse": " "}, {"instruction": "a", "output": "b"}]
    rows += [{"messages": chat("a", "b"), "worse": "c\ud800"}, {"messages": chat("a", "b")}]
    checked = check(rows, {"rejected": "worse"}, wanted=("rejected",))
    assert [dict(row.columns) for row in checked.rows] == [{"rejected": "c"}, {"rejected": "c?"}]
    assert [(p.row, p.kind) for p in checked.problems if p.action == "dropped"] == [
        (1, "not_text"),
        (2, "empty_answer"),
        (3, "missing_column"),
        (5, "missing_column"),
    ]
    assert all(not row.columns for row in check(rows, {}).rows)


def test_a_row_says_of_itself_only_what_it_has() -> None:
    """So that the hash of data without conversations is what it was before there were any."""
    (plain,) = check([{"instruction": "a", "output": "b"}], {}).rows
    assert plain.plain() == {"instruction": "a", "input": "", "output": "b", "group": ""}
    (talk,) = check([{"messages": chat("a", "b")}], {}).rows
    assert talk.plain()["turns"] == (("a", "b"),)
