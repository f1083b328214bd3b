"""The page in a real browser: filter, sort, compare, address, downloads, keyboard, phone, accessibility, attacks."""

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from fedtune.board.site import build
from fedtune.board.store import write_entry
from fedtune.results.entry import Answers, Entry
from tests.board.entries import entry, many, score

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site")
    made = [entry(i, 150 - 10 * i) for i in range(6)]
    made += [entry(6, 140, domain="medical"), entry(7, 80, state="flagged", reasons=["59.94 is not k/500"])]
    made += [entry(0, 148, seed=2), entry(0, 152, seed=3)]
    for one in made:
        write_entry(root / "store", one)
    build(root / "store", root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        opened = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, site: Path) -> Iterator[Any]:
    context = browser.new_context(accept_downloads=True, viewport={"width": 1300, "height": 900})
    tab = context.new_page()
    tab.complaints = []
    tab.on("console", lambda m: tab.complaints.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: tab.complaints.append(str(e)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "blob:")) else tab.complaints.append(r.url))
    tab.goto((site / "index.html").as_uri() + "#board=finance")
    yield tab
    # no error, and not one request to anywhere
    assert tab.complaints == []
    context.close()


def teams(page: Any) -> list[str]:
    found: list[str] = page.locator("#board tbody tr td[data-label=Who] button").all_text_contents()
    return found


def test_rows_come_sorted_with_ties_and_hints(page: Any) -> None:
    assert teams(page) == ["team 0", "team 1", "team 2", "team 3", "team 4", "team 5", "team 7"]
    ranks = page.locator("#board tbody td[data-label=Rank]").all_text_contents()
    assert ranks[0] == "1"
    assert ranks == [*sorted(ranks[:-1], key=int), "–"]
    hint = page.locator("#board tbody td[data-label='Score, %']").first.get_attribute("title")
    assert "base 45.0, delta +30.0" in hint
    assert "majority class 50.0" in hint
    assert "7 of 7 rows" in page.locator("#status").text_content()


def test_sorting_filtering_and_searching(page: Any) -> None:
    page.click("#sort-bytes")
    assert teams(page)[0] == "team 0"
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.click("#sort-bytes")
    assert teams(page)[0] == "team 7"
    page.select_option("#filter-method", "flexlora")
    assert teams(page) == ["team 2"]
    page.click("#reset")
    page.select_option("#filter-state", "flagged")
    assert teams(page) == ["team 7"]
    page.click("#reset")
    page.fill("#search", "mistral fedit")
    assert teams(page) == []
    page.fill("#search", "llama ffa")
    assert teams(page) == ["team 1"]


def test_the_address_holds_the_state(page: Any) -> None:
    page.select_option("#filter-method", "fedit")
    page.click("#sort-seconds")
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    assert teams(page) == ["team 0", "team 4"]
    page.click("#tab-medical")
    assert teams(page) == ["team 6"]
    assert "board=medical" in page.url


@pytest.mark.parametrize(
    "hostile",
    [
        "board=<img src=x onerror=alert(1)>&sort=__proto__&mode=constructor",
        "pair=x,y,z&method=%3Cscript%3E&up=9",
        "search=" + "%3Csvg/onload=alert(1)%3E" * 40,
        "%E0%A4%A",
    ],
)
def test_a_hostile_address_does_nothing(page: Any, site: Path, hostile: str) -> None:
    page.goto("about:blank")
    alerts: list[str] = []
    page.on("dialog", lambda d: (alerts.append(d.message), d.dismiss()))
    page.goto((site / "index.html").as_uri() + "#" + hostile)
    assert page.locator("#board thead th").count() == 13
    assert page.locator("img, script[src]").count() == 0
    assert alerts == []


def test_two_rows_are_compared_with_a_paired_test(page: Any) -> None:
    boxes = page.locator("#board tbody input[type=checkbox]")
    boxes.nth(0).check()
    assert page.locator("#compare").is_hidden()
    boxes.nth(2).check()
    text = page.locator("#compare").text_content()
    # the first has three seeds (150, 148 and 152 of 200), the second one (130): item 151 is right in one seed of three
    assert "22 items the first has right more often, 0 the second" in text
    assert "difference (95 %) -1" in text
    assert page.locator("#compare svg rect").count() == 2
    page.reload()
    assert page.locator("#compare").is_visible()


def test_details_curves_and_breakdown(page: Any) -> None:
    button = page.locator("#board tbody td[data-label=Who] button").first
    button.click()
    more = page.locator("tr.more")
    assert button.get_attribute("aria-expanded") == "true"
    text = more.text_content()
    for part in ("seeds", "1, 2, 3", "training loss by round", "fpb (likelihood) by round", "corrected"):
        assert part in text, part
    assert more.locator("path.line").count() == 2
    button.click()
    assert more.count() == 0


def test_downloads(page: Any) -> None:
    page.select_option("#filter-method", "fedit")
    with page.expect_download() as caught:
        page.click("#csv")
    lines = Path(caught.value.path()).read_text().splitlines()
    assert caught.value.suggested_filename == "board.csv"
    assert len(lines) == 3
    assert lines[1].startswith('"1","team 0"')
    with page.expect_download() as caught:
        page.click("#json")
    assert [r["team"] for r in json.loads(Path(caught.value.path()).read_text())] == ["team 0", "team 4"]


def test_dominated_points_are_grey(page: Any) -> None:
    assert page.locator("#pareto circle").count() == 7
    assert page.locator("#pareto circle.dominated").count() == 6
    page.locator("#pareto circle").nth(3).dispatch_event("click")
    assert page.evaluate("document.activeElement.textContent") == "team 3"


def test_everything_works_from_the_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the table"
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''")
        )
    for wanted in ("tab-finance", "search", "filter-method", "csv", "sort-score", "compare team 0"):
        assert wanted in seen, wanted
    page.focus("#sort-method")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "sort-method"
    page.focus("#board tbody td[data-label=Who] button")
    page.keyboard.press("Enter")
    assert page.locator("tr.more").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 390])
def test_accessible_in_both_colours_and_on_a_phone(page: Any, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.locator("#board tbody input[type=checkbox]").nth(0).check()
    page.locator("#board tbody input[type=checkbox]").nth(1).check()
    page.locator("#board tbody td[data-label=Who] button").first.click()
    script = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page.evaluate(script)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        (v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"] if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_overall_board_needs_every_domain(page: Any) -> None:
    page.click("#tab-overall")
    assert page.locator("#board tbody tr").count() == 8
    assert "1 of 2 domains" in page.locator("#board tbody").text_content()


def test_the_overall_board_says_of_a_row_what_is_said_of_its_parts(browser: Any, tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"domain": "code", "state": "re-run"},
        {"domain": "finance", "state": "flagged", "reasons": ["trained on the test set"]},
        {"domain": "medical", "unranked": ["a part of a set"], "state": "reported"},
    ]
    for part in parts:
        write_entry(tmp_path / "store", entry(0, **part))
    build(tmp_path / "store", tmp_path / "out")
    tab = browser.new_page()
    tab.goto((tmp_path / "out/index.html").as_uri() + "#board=overall")
    assert tab.locator("#board tbody td[data-label=State]").text_content() == "flagged"
    assert tab.locator("#board tbody .state").get_attribute("title") == "finance: trained on the test set"
    assert tab.locator("#board tbody td[data-label=Rank]").get_attribute("title") == "medical: a part of a set"
    # the flagged board adds nothing, and an average over the others would not be overall
    assert "–" in tab.locator("#board tbody td[data-label^=Score]").text_content()
    tab.locator("#board tbody tr button").first.click()
    assert "medical: a part of a set" in tab.locator("tr.more").text_content()
    tab.close()


def test_reasons_are_listed_one_by_one(browser: Any, tmp_path: Path) -> None:
    why = ["a protocol of its own", "the model is a local folder; its hash is known"]
    write_entry(tmp_path / "store", entry(0, unranked=why))
    (tmp_path / "store/zz.json").write_text("{}")
    build(tmp_path / "store", tmp_path / "out")
    tab = browser.new_page()
    tab.goto((tmp_path / "out/index.html").as_uri() + "#board=finance")
    assert tab.locator("#board tbody td[data-label=Rank]").get_attribute("title") == "\n".join(why)
    tab.locator("#board tbody tr button").first.click()
    assert tab.locator("tr.more dt:text-is('not ranked') + dd li").all_text_contents() == why
    assert tab.locator("tr.more dt:text-is('notes') + dd li").count() == 0  # one alone is no list
    assert tab.locator("tr.more dt:text-is('notes') + dd").text_content().startswith("1 of 3 seeds")
    (left_out,) = tab.locator("footer li").all_text_contents()
    assert left_out.startswith("zz.json: left out: ")
    tab.close()


def test_a_thousand_rows_render_at_once(browser: Any, tmp_path: Path) -> None:
    """All rows are in the document when the script has run: nothing is paged, nothing is waited for."""
    for one in many(1000):
        write_entry(tmp_path / "store", one.model_copy(update={"domain": "finance"}))
    build(tmp_path / "store", tmp_path / "out")
    tab = browser.new_page()
    tab.goto((tmp_path / "out/index.html").as_uri(), wait_until="domcontentloaded")
    assert tab.locator("#board tbody tr").count() == 1000
    tab.close()


def test_texts_from_a_submission_stay_texts(browser: Any, tmp_path: Path) -> None:
    """The schema refuses markup; a page built past it shows the letters and runs nothing."""
    evil = "<img src=x onerror=\"document.title='owned'\">"
    plain = entry(0)
    hostile = Entry.model_construct(**{**dict(plain), "team": evil, "title": "</script><b>x</b>"})
    from fedtune.board.build import recipes, row
    from fedtune.board.site import page as render

    data = {
        "rows": [row(recipes([hostile])[0])],
        "domains": ["finance"],
        "modes": ["likelihood"],
        "ranks": {},
        "made_by": "x",
        "entries": 1,
        "store_sha256": "x",
    }
    (tmp_path / "x.html").write_text(render(data))
    tab = browser.new_page()
    tab.goto((tmp_path / "x.html").as_uri())
    assert tab.title() == "Federated fine-tuning of language models: the board"
    assert tab.locator("img, b >> text=x").count() == 0
    assert evil in tab.locator("#board tbody").text_content()
    tab.close()
    assert Answers.pack([True], "x").n == score(1, 1).n == 1


@pytest.mark.parametrize(
    ("one", "two", "apart"),
    [
        ([150], [130], True),
        ([103], [100], False),
        ([100, 150, 150], [100, 100, 100], None),
        ([150, 90, 90], [110, 110, 110], False),
        ([120, 121, 122], [80, 81, 79], True),
    ],
)
def test_the_pages_paired_interval_is_over_items_and_seeds(
    browser: Any, one: list[int], two: list[int], apart: bool | None
) -> None:
    """The interval of the page and the p of the ranks agree wherever neither is at its limit."""
    from fedtune.board.build import recipes, row, separable
    from fedtune.board.site import _part

    def line(number: int, right: list[int]) -> dict[str, Any]:
        flags = [Answers.pack([i < r for i in range(200)], "i" * 64) for r in right]
        made = [
            entry(number, r, seed=s, answers={"federated/fpb/likelihood": f})
            for s, (r, f) in enumerate(zip(right, flags, strict=True), 1)
        ]
        return row(recipes(made)[0])

    first, second = line(0, one), line(1, two)
    source = _part("page.js")
    functions = source[source.index("function flags") : source.index("function drawCompare")]
    tasks = json.dumps([first["tasks"][0], second["tasks"][0]])
    tab = browser.new_page()
    got = tab.evaluate(f"(() => {{ {functions}; return paired(...{tasks}); }})()")
    tab.close()
    means = [sum(r) / len(r) / 200 for r in (one, two)]
    assert got["low"] <= means[1] - means[0] <= got["high"]
    if apart is not None:
        assert (got["low"] > 0 or got["high"] < 0) == apart == separable(first, second, "likelihood")


def test_an_empty_board_says_how_to_submit(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    build(tmp_path / "store", tmp_path / "out")
    tab = browser.new_page(viewport={"width": 390, "height": 900})
    complaints: list[str] = []
    tab.on("pageerror", lambda e: complaints.append(str(e)))
    tab.goto((tmp_path / "out/index.html").as_uri())
    assert tab.locator("#empty").is_visible()
    assert "fedtune submit" in tab.locator("#empty").inner_text()
    assert not tab.locator("#board").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert complaints == []
    tab.close()
