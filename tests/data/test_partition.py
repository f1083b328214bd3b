import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.check import TrainRow
from fedtune.data.partition import partition, table
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
    with pytest.raises(DataError, match="at least two natural keys"):
        partition([TrainRow("", "", "x")] * 5, "dirichlet:1", 2, 42)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 12))
def test_more_clients_than_rows_leave_some_empty_and_lose_none(rows: int, clients: int) -> None:
    shards = partition(_rows(rows), "iid", clients, 42)
    assert sorted(i for s in shards for i in s) == list(range(rows))
