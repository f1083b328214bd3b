"""A result has each arm once, and each arm each score once: what is there a thousand times is not read so often."""

import pytest
from pydantic import ValidationError

from fedtune.results.entry import Entry
from fedtune.results.schema import Arm
from tests.board.entries import entry, score


def test_a_score_that_is_there_twice_is_refused_by_its_name() -> None:
    one = score(20)
    with pytest.raises(ValidationError, match=f"{one.task}/{one.mode} is scored more than once"):
        Arm(name="base", scores=[one, one])
    assert Arm(name="base", scores=[one, one.model_copy(update={"mode": "official"})]).name == "base"


def test_an_arm_that_is_there_twice_is_refused_by_its_name() -> None:
    plain = entry(0).model_dump(mode="json")
    plain["arms"] = [plain["arms"][0]] * 2
    with pytest.raises(ValidationError, match="the arm base is there more than once"):
        Entry.model_validate(plain)
