"""What may stand in an entry is looked at in a time that grows with the entry, and what may not is named."""

from fedtune.results.bounds import unbounded


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
