"""What a stranger's files may make a check do grows with their length, and no faster; what they hold in memory too."""

from collections.abc import Iterator
from typing import Any

import pytest

from fedtune.board import turns
from fedtune.config.schema import FederationSettings


class Rows(list[int]):
    """Rows of the clients that count how often all of them are gone through."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(rows)
        self.walks = 0

    def __iter__(self) -> Iterator[int]:
        self.walks += 1
        return super().__iter__()


def asked(clients: int, cohort: list[Any], rows: list[int]) -> list[str]:
    line = {"cohort": cohort, "clients": [], "bytes_up": 0, "bytes_down": 0, "status": "skipped"}
    return list(turns._one(line, FederationSettings(clients=clients), rows))


def test_the_clients_rows_are_not_gone_through_for_each_that_was_asked() -> None:
    rows = Rows([1] * 1_000)
    assert asked(1_000, list(range(1_000)), rows) == []
    assert rows.walks == 0


@pytest.mark.parametrize("cohort", [[-1], [3], [0, 0], [True], ["0"], [0.0], [10**30]], ids=str)
def test_a_client_that_there_cannot_be_was_not_asked(cohort: list[Any]) -> None:
    assert asked(3, cohort, [1, 1, 1]) == ["a client is there twice, or was not asked"]


def test_clients_without_rows_were_not_asked() -> None:
    assert asked(4, [0, 1, 2, 3], [1, 0, 1]) == ["the clients [1, 3] were asked, and have no rows"]


@pytest.mark.parametrize(
    ("rows", "masked", "fewest"), [([], 0, 0), ([3], 9, 1), ([0, 2, 1, 4], 0, 3), ([1, 2, 4], 3, 1), ([1, 2, 4], 2, 2)]
)
def test_the_smallest_clients_may_have_no_label_left(rows: list[int], masked: int, fewest: int) -> None:
    assert turns._fewest(rows, masked) == fewest
