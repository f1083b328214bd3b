import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.check import TrainRow
from fedtune.data.partition import partition, problems, table
from fedtune.types import DataError


def _rows(n: int, groups: int = 3) -> list[TrainRow]:
    return [TrainRow("i", str(k), "o", group=f"g{k % groups}") for k in range(n)]


def test_iid_is_exactly_how_flowertune_shards() -> None:
    import datasets

    rows = _rows(103)
    shuffled = datasets.Dataset.from_dict({"k": list(range(103))}).shuffle(seed=42)
    want = [list(shuffled.shard(num_shards=10, index=i, contiguous=True)["k"]) for i in range(10)]
    assert partition(rows, "iid", 10, 42) == want


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.3", "shards:2", "linear", "square", "exponential"])
def test_every_partition_gives_each_row_to_one_client_and_is_seeded(spec: str) -> None:
    rows = _rows(240)
    shards = partition(rows, spec, 4, 7)
    given_out = [i for shard in shards for i in shard]
    assert len(shards) == 4
    assert len(given_out) == len(set(given_out))
    assert len(given_out) == 240
    assert partition(rows, spec, 4, 7) == shards
    assert partition(rows, spec, 4, 8) != shards


def test_dirichlet_skews_labels() -> None:
    rows = _rows(600)
    flat, skewed = (table(rows, partition(rows, f"dirichlet:{a}", 5, 1)) for a in ("1000", "0.1"))

    def worst(counts: list[dict[str, int]]) -> float:
        return max(max(c.values()) / sum(c.values()) for c in counts if c)

    assert worst(flat) < 0.45 < 0.7 < worst(skewed)


def test_natural_gives_each_client_one_key_largest_first() -> None:
    rows = [TrainRow("", "", "", g) for g in "aabbbbccc"]
    shards = partition(rows, "natural", 3, 42)
    assert [{rows[i].group for i in s} for s in shards] == [{"b"}, {"c"}, {"a"}]
    with pytest.raises(DataError, match="3 values, fewer than the 4 clients"):
        partition(rows, "natural", 4, 42)


def test_a_set_without_a_natural_key_says_so() -> None:
    with pytest.raises(DataError, match="at least two values"):
        partition([TrainRow("", "", "x")] * 5, "dirichlet:1", 2, 42)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 12))
def test_more_clients_than_rows_leave_some_empty_and_lose_none(rows: int, clients: int) -> None:
    shards = partition(_rows(rows), "iid", clients, 42)
    assert sorted(i for s in shards for i in s) == list(range(rows))


@pytest.mark.parametrize(
    "spec",
    [
        "shards:2.7",
        "shards:0.5",
        "shards:0",
        "shards:-1",
        "shards:",
        "shards",
        "shards:1e1",
        "shards:２",
        "shards:+2",
        "shards:1_0",
        "shards:2:2",
        "dirichlet:nan",
        "dirichlet:inf",
        "dirichlet:0",
        "dirichlet:-1",
        "dirichlet:1_0",
        "dirichlet:1e400",
        "dirichlet:1e-300",
        "dirichlet:",
        "dirichlet",
        "dirichlet:0,5",
        "iid:",
        "iid:3",
        "natural:2",
        "IID",
    ],
)
def test_a_partition_that_is_not_written_exactly_is_refused_wherever_it_comes_from(spec: str) -> None:
    assert len(problems(spec)) == 1
    with pytest.raises(DataError, match=r"^data\.partition = ") as caught:
        partition(_rows(240), spec, 4, 7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["shards:2", "dirichlet:0.3", "dirichlet:.5", "dirichlet:1e-1", "dirichlet:3.", "iid"])
def test_a_partition_that_is_written_exactly_is_taken(spec: str) -> None:
    assert problems(spec) == []


def test_more_shards_than_rows_are_refused() -> None:
    assert [len(s) for s in partition(_rows(240), "shards:60", 4, 7)] == [60] * 4
    with pytest.raises(DataError, match="61 shards for each of 4 clients are 244, more than the 240 rows"):
        partition(_rows(240), "shards:61", 4, 7)


@pytest.mark.parametrize("spec", ["dirichlet:0.5", "shards:2", "natural"])
def test_free_text_is_no_natural_key(spec: str) -> None:
    with pytest.raises(DataError, match=r"240 values in 240 rows\. Is the column free text"):
        partition(_rows(240, groups=240), spec, 4, 7)
    with pytest.raises(DataError, match="at least two values; this set has 1"):
        partition(_rows(240, groups=1), spec, 4, 7)


def test_natural_sites_may_have_a_long_tail() -> None:
    rows = _rows(40, groups=2) + [TrainRow("i", str(k), "o", group=f"alone {k}") for k in range(60)]
    assert [len(s) for s in partition(rows, "natural", 2, 7)] == [20, 20]
    with pytest.raises(DataError, match="free text"):
        partition(rows, "dirichlet:0.3", 2, 7)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["iid", "dirichlet:0.001", "dirichlet:1000", "natural", "shards:1", "shards:3", "linear", "square"])
    | st.just("exponential"),
    st.integers(1, 60),
    st.integers(1, 12),
    st.sampled_from([1, 2, 5, 40, 900]),
)
def test_every_partition_ends_in_disjoint_shards_or_one_line(spec: str, rows: int, groups: int, clients: int) -> None:
    shards: list[list[int]] = []
    said = ""
    try:
        shards = partition(_rows(rows, groups), spec, clients, 7)
    except DataError as err:
        said = str(err)
    assert "\n" not in said
    assert len(said) < 400
    assert len(shards) == (0 if said else clients)
    given_out = [i for shard in shards for i in shard]
    assert len(given_out) == len(set(given_out)) <= rows
    assert set(given_out) <= set(range(rows))
