"""The store and the board made from it: places, seeds, ties, and a thousand rows without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from fedtune.board.build import board, ranked, row, separable
from fedtune.board.build import recipes as group
from fedtune.board.pairs import FEWEST, p_value
from fedtune.board.site import build, embedded, page
from fedtune.board.store import read_entry, write_entry
from fedtune.cli import app
from fedtune.results.entry import Answers, Entry, Privacy, unpacked
from fedtune.results.schema import Arm
from fedtune.results.stats import mcnemar
from fedtune.types import CorruptFileError, DataError
from tests.board.entries import entry, many, score


def test_an_entry_has_one_place_and_nothing_else_may_take_it(tmp_path: Path) -> None:
    one = entry(0)
    path = write_entry(tmp_path, one)
    place = path.relative_to(tmp_path).parts
    assert place[0] == "finance"
    assert place[1] == f"Qwen-Qwen2.5-0.5B-Instruct@{'r' * 12}"
    assert place[2:] == ("fedit", "0" * 16, "seed-1.json")
    assert read_entry(path) == one
    assert write_entry(tmp_path, one) == path
    with pytest.raises(DataError, match="an entry of this recipe and seed already"):
        write_entry(tmp_path, one.model_copy(update={"team": "another"}))
    path.write_text("{}")
    with pytest.raises(CorruptFileError, match="domain"):
        read_entry(path)


def test_places_never_lead_out_of_the_store() -> None:
    odd = entry(0, domain="../../etc", base="../x", method="..", config_sha256="")
    assert ".." not in odd.place().parts
    assert not odd.place().is_absolute()


@pytest.mark.parametrize("field", ["team", "title", "base", "method"])
@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a\u202eb", "a\x00b"])
def test_texts_with_markup_are_refused(field: str, text: str) -> None:
    with pytest.raises(ValidationError, match="write plain text"):
        entry(0, **{field: text})


def test_links_are_https_or_nothing() -> None:
    with pytest.raises(ValidationError):
        entry(0, link="javascript:alert(1)")
    assert entry(0, link="https://example.org/x").link


def test_answers_survive_packing() -> None:
    flags = [i % 3 == 0 for i in range(77)]
    packed = Answers.pack(flags, "x")
    assert unpacked(packed.bits, packed.n).tolist() == flags
    assert unpacked(Answers.pack([], "x").bits, 0).tolist() == []
    with pytest.raises(ValueError, match="bits for 200 items"):
        Answers(items_sha256="x", n=200, bits="AAAA")


def test_answers_are_measured_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at most 1000000 characters"):
        Answers(items_sha256="", n=0, bits="A" * 1_000_004)
    with pytest.raises(ValueError, match="24 bits for 25 items"):
        Answers(items_sha256="", n=25, bits="AAAA")
    monkeypatch.setattr("fedtune.results.entry.unpacked", lambda bits, n: pytest.fail("unpacked"))
    assert Answers(items_sha256="", n=24, bits="AAAA").n == 24


def _row(right: int, number: int, **changes: Any) -> dict[str, Any]:
    return row(group([entry(number, right, **changes)])[0])


def test_seeds_of_one_recipe_are_one_row() -> None:
    seeds = [entry(0, right, seed=seed) for seed, right in ((1, 100), (2, 120), (3, 110))]
    made = group(seeds)
    assert len(made) == 1
    line = row(made[0])
    assert line["seeds"] == [1, 2, 3]
    assert line["scores"]["likelihood"] == pytest.approx(0.55)
    assert line["tasks"][0]["spread"] == pytest.approx(0.05)
    assert line["tasks"][0]["base"] == pytest.approx(0.45)
    with pytest.raises(DataError, match="seed 1 is there more than once"):
        group([seeds[0], seeds[0]])


def test_the_interval_is_wilsons() -> None:
    from scipy.stats import binomtest

    task = _row(120, 0)["tasks"][0]
    want = binomtest(120, 200).proportion_ci(method="wilson")
    assert (task["low"], task["high"]) == (pytest.approx(want.low), pytest.approx(want.high))


def test_rows_that_cannot_be_told_apart_share_a_rank() -> None:
    rows = [_row(150, 0), _row(149, 1), _row(100, 2), _row(140, 3, state="flagged", reasons=["impossible"])]
    ranks = ranked(rows, "finance", "likelihood")
    assert [ranks.get(r["id"]) for r in rows] == [1, 1, 3, None]
    assert separable(rows[0], rows[2], "likelihood")
    other = _row(149, 1, answers={})
    assert not separable(rows[0], other, "likelihood")
    assert separable(rows[2], other, "likelihood")


def _recipe(number: int, right: list[int], seeds: list[int] | None = None) -> dict[str, Any]:
    made = [
        entry(
            number,
            count,
            seed=seed,
            answers={"federated/fpb/likelihood": Answers.pack([i < count for i in range(200)], "i" * 64)},
            arms=[Arm(name="base", scores=[score(90)]), Arm(name="federated", scores=[score(count)])],
        )
        for seed, count in zip(seeds or range(1, len(right) + 1), right, strict=True)
    ]
    return row(group(made)[0])


def test_ranks_rest_on_all_seeds_and_not_on_the_lowest() -> None:
    better, worse = _recipe(0, [100, 150, 150]), _recipe(1, [100, 100, 100])
    assert separable(better, worse, "likelihood")
    assert ranked([better, worse], "finance", "likelihood") == {better["id"]: 1, worse["id"]: 2}
    lucky, even = _recipe(0, [150, 90, 90]), _recipe(1, [110, 110, 110])
    assert lucky["scores"]["likelihood"] == pytest.approx(even["scores"]["likelihood"])
    assert not separable(lucky, even, "likelihood")


def test_the_order_of_the_seeds_changes_nothing() -> None:
    other = _recipe(9, [110, 112, 114])
    found = {separable(_recipe(0, [90, 130, 150], seeds), other, "likelihood") for seeds in ([1, 2, 3], [3, 2, 1])}
    assert len(found) == 1


def test_a_row_says_who_chose_its_seeds_and_how_few_there_are() -> None:
    assert _recipe(0, [100, 101, 102])["remarks"] == []
    assert _recipe(0, [100])["remarks"] == ["1 of 3 seeds: how much another would differ is not known"]
    chosen = _recipe(0, [100, 101, 102], [4, 8, 15])["remarks"]
    assert chosen == ["its maker chose the seeds; asked for are 1, 2, 3"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=40, max_size=40), min_size=1, max_size=3), st.data())
def test_a_recipe_is_never_told_from_itself_and_the_test_has_no_side(
    flags: list[list[bool]], data: st.DataObject
) -> None:
    one = np.array(flags)
    assert p_value([(one, one)]) == 1
    two = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=40, max_size=40), min_size=1, max_size=3)))
    assert 0 <= p_value([(one, two)]) <= 1
    other = ~one[:, ::-1]
    assert p_value([(one, two), (other, two)]) == p_value([(two, one), (two, other)])


def test_the_paired_bootstrap_is_near_mcnemar_for_one_seed() -> None:
    for gained, lost in ((20, 0), (8, 2), (30, 15), (12, 9), (5, 0), (40, 38)):
        one = np.array([[True] * gained + [False] * lost + [True] * (200 - gained - lost)])
        two = np.array([[False] * gained + [True] * lost + [True] * (200 - gained - lost)])
        if gained + lost >= FEWEST:
            assert p_value([(one, two)]) == pytest.approx(mcnemar(gained, lost), abs=0.2)
        assert (p_value([(one, two)]) < 0.05) == (mcnemar(gained, lost) < 0.05)


def test_what_is_unranked_or_without_score_has_no_rank() -> None:
    rows = [_row(150, 0, unranked=["quickstart"]), _row(149, 1, arms=[Arm(name="federated", scores=[])])]
    assert ranked(rows, "finance", "likelihood") == {}


def test_a_board_says_what_it_is_made_of(tmp_path: Path) -> None:
    assert board(tmp_path)["rows"] == []
    with pytest.raises(DataError, match="no such folder"):
        board(tmp_path / "nothing")
    for made in many(12):
        write_entry(tmp_path, made)
    data = build(tmp_path, tmp_path / "site")
    assert json.loads((tmp_path / "site/board.json").read_text()) == json.loads(json.dumps(data))
    assert (data["entries"], len(data["rows"]), data["domains"]) == (12, 12, ["code", "finance", "general", "medical"])
    assert set(data["ranks"]) == {f"{d}/likelihood" for d in data["domains"]}
    private = row(group([entry(0, privacy=Privacy(unit="client", epsilon=2.0, delta=1e-5))])[0])
    assert private["privacy"]["epsilon"] == 2.0


def test_data_cannot_leave_its_script_element() -> None:
    text = embedded({"x": "</script><script>alert(1)</script>&\u2028"})
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {"x": "</script><script>alert(1)</script>&\u2028"}
    made = page({"rows": [], "domains": [], "modes": [], "ranks": {}, "x": "@js@ @css@ @data@"})
    assert made.count("<script>") == 1
    assert "default-src 'none'" in made
    assert "http" not in made.split("<style>")[1].split("</style>")[0]


def test_a_thousand_rows_are_built_and_checked_without_torch(tmp_path: Path) -> None:
    for made in many(1000):
        write_entry(tmp_path / "store", made)
    program = (
        "import sys; from pathlib import Path; from fedtune.board.site import build\n"
        "from fedtune.board.validate import check\n"
        f"data = build(Path({str(tmp_path / 'store')!r}), Path({str(tmp_path / 'site')!r}))\n"
        "assert len(data['rows']) == 1000\n"
        f"assert check(Path({str(tmp_path / 'nothing')!r}))[0][2]\n"
        "print([m for m in ('torch', 'transformers', 'flwr', 'datasets', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_schema_that_is_documented_is_the_schema(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "docs/entry.schema.json"
    assert json.loads(path.read_text()) == Entry.model_json_schema()
    assert score(10).n == 200


def _spoilt(change: dict[str, Any]) -> Any:
    def merge(into: dict[str, Any], what: dict[str, Any]) -> dict[str, Any]:
        return into | {k: merge(into[k], v) if isinstance(into.get(k), dict) else v for k, v in what.items()}

    return merge(entry(1).model_dump(mode="json"), change)


UNSHOWABLE: list[dict[str, Any]] = [
    {"code": {"commit": "\ud800"}},
    {"code": {"commit": {"a": 1}}},
    {"costs": {"peak_memory_bytes": 10**400}},
    {"costs": {"bytes_up": 10**400}},
    {"costs": {"bytes_up": -1}},
    {"costs": {"wall_seconds": 1e308}},
    {"costs": {"energy_joules": 1e308}},
    {"seed": 10**300},
    {"losses": [1e308]},
    {"config": {"lora": {"r": 10**400}}},
    {"config": {"a": {"b": [{"c": "\u202e"}]}}},
    {"config": {"\x1b]0;": 1}},
    {"data": {"name": "x" * 10**5}},
    {"machine": {"cpus": 10**300}},
    {"versions": {"torch": "\x1b[2J"}},
    {"domain": "d" * 300},
]


@pytest.mark.parametrize("change", UNSHOWABLE)
def test_what_no_page_can_show_is_refused_and_left_out_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Entry.model_validate(_spoilt(change))
    write_entry(tmp_path / "store", entry(0))
    (tmp_path / "store/bad.json").write_text(json.dumps(_spoilt(change)))
    done = CliRunner().invoke(app, ["board", "build", str(tmp_path / "store"), "--out", str(tmp_path / "site")])
    assert done.exit_code == 0, done.output
    assert "warning: bad.json: left out: " in done.output
    data = json.loads((tmp_path / "site/board.json").read_text())
    assert (len(data["rows"]), len(data["left_out"])) == (1, 1)


def test_a_row_that_cannot_be_made_and_an_entry_that_is_there_twice_are_left_out(tmp_path: Path) -> None:
    path = write_entry(tmp_path, entry(0))
    (tmp_path / "zz.json").write_bytes(path.read_bytes())
    wrong = score(100).model_copy(update={"score": 50.0})
    write_entry(tmp_path, entry(1, arms=[Arm(name="federated", scores=[wrong])]))
    data = build(tmp_path, tmp_path / "site")
    assert [r["team"] for r in data["rows"]] == ["team 0"]
    assert "zz.json: left out: finance/" in data["left_out"][0]
    assert "/ffa_lora/" in data["left_out"][1]


INVISIBLE = "\xad\u034f\u115f\u180e\u2800\u3164\uffa0\ufff9\U000e0041\u200b\u202e\x1b\x9d\ud800\u200d"


@pytest.mark.parametrize("character", INVISIBLE)
@pytest.mark.parametrize("field", ["team", "title", "link", "base"])
def test_what_shows_nothing_is_in_no_text_of_a_row(field: str, character: str) -> None:
    start = "https://example.org/" if field == "link" else "a"
    with pytest.raises(ValidationError):
        entry(0, **{field: f"{start}{character}b"})


def test_a_team_of_blanks_is_none_and_other_scripts_are_welcome() -> None:
    for blank in (" ", "\xa0\u3000", "a ", " a"):
        with pytest.raises(ValidationError, match="blanks"):
            entry(0, team=blank)
    for name in ("Équipe n° 1", "北京　队", "می\u200cخواهم", "❤\ufe0f team", "👩\u200d🔬"):
        assert entry(0, team=name).team == name
