"""Whose update makes a server step fail is left out, and the others count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from fedtune.federation.guard import LARGEST, aggregated, state_problem
from fedtune.lora.base_delta import Piece
from fedtune.lora.product import Product
from fedtune.lora.state import LoraModule
from fedtune.methods import ClientUpdate, ServerState
from fedtune.types import RunFailedError, UpdateError


def update(client: int, size: float = 1.0) -> ClientUpdate:
    return ClientUpdate(client, {"x": torch.tensor([size])}, 1.0)


def state(value: float, round_: int = 1) -> ServerState:
    return ServerState({"q": LoraModule(torch.full((1, 1), value), torch.zeros(1, 1), 1.0)}, round_)


class Step:
    """The mean, unless one of some clients is there."""

    def __init__(self, bad: set[int], error: Exception | float) -> None:
        self.bad, self.error = bad, error
        self.calls: list[list[int]] = []

    def __call__(self, updates: Sequence[ClientUpdate]) -> ServerState:
        self.calls.append([u.client for u in updates])
        found = self.bad & set(self.calls[-1])
        if found and isinstance(self.error, UpdateError):
            raise UpdateError(min(found), "zero")
        if found and isinstance(self.error, Exception):
            raise self.error
        if found and isinstance(self.error, float):
            return state(self.error)
        return state(sum(float(u.tensors["x"]) for u in updates) / len(updates))


FAILURES = [
    torch.linalg.LinAlgError("did not converge"),
    ValueError("negative"),
    MemoryError(),
    KeyError("x"),
    math.nan,
    math.inf,
    10 * LARGEST,
]


@pytest.mark.parametrize("error", FAILURES, ids=str)
@pytest.mark.parametrize("culprit", [0, 2, 4])
def test_the_one_that_breaks_the_step_is_found_and_the_others_count(error: Exception | float, culprit: int) -> None:
    step = Step({culprit}, error)
    done = aggregated(step, [update(c, 1.0 + c) for c in range(5)])
    assert done.state is not None
    assert [(r.client, r.reason) for r in done.rejected] == [(culprit, "aggregation")]
    others = [1.0 + c for c in range(5) if c != culprit]
    assert float(done.state.adapter["q"].a) == pytest.approx(sum(others) / 4)


def test_a_named_culprit_is_left_out_at_once_and_so_are_several() -> None:
    step = Step({1, 3}, UpdateError(1, "zero"))
    done = aggregated(step, [update(c) for c in range(5)])
    assert step.calls == [[0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 2, 4]]
    assert [(r.client, r.detail) for r in done.rejected] == [(1, "zero"), (3, "zero")]


def test_the_largest_is_suspected_first_and_two_together_if_need_be() -> None:
    step = Step({1}, ValueError("no"))
    aggregated(step, [update(0), update(1, 100.0), update(2)])
    assert step.calls == [[0, 1, 2], [0, 2]]
    both = aggregated(Step({1, 2}, ValueError("no")), [update(c, 9.0 if c in (1, 2) else 1.0) for c in range(5)])
    assert {r.client for r in both.rejected} == {1, 2}
    assert both.state is not None


def test_a_step_that_fails_whoever_is_left_out_is_no_step() -> None:
    step = Step(set(range(40)), ValueError("[/always] \x1b"))
    done = aggregated(step, [update(c) for c in range(40)])
    assert done.state is None
    assert done.rejected == ()
    assert done.note == "the server step failed, whoever was left out: ValueError: [/always] \\x1b"
    assert len(step.calls) <= 17, "the search does not grow with the cohort"


def test_too_few_updates_for_a_rule_are_not_made_fewer() -> None:
    tried: list[int] = []

    def step(updates: Sequence[ClientUpdate]) -> ServerState:
        tried.append(len(updates))
        if len(updates) == 4:
            raise UpdateError(0, "too strong")
        raise RunFailedError("needs 5 updates per round; 3 came")

    found = aggregated(step, [update(c) for c in range(4)])
    assert (found.state, [r.client for r in found.rejected]) == (None, [0])
    assert found.note == "needs 5 updates per round; 3 came"
    assert tried == [4, 3]


def test_a_client_nobody_sent_cannot_be_blamed_and_a_sum_is_not_taken_apart() -> None:
    def blames(updates: Sequence[ClientUpdate]) -> ServerState:
        raise UpdateError(99, "somebody else")

    assert aggregated(blames, [update(0), update(1)]).state is None
    assert aggregated(Step({0}, ValueError("no")), [update(0)]).state is None


def test_no_part_of_a_state_may_be_unsound() -> None:
    good = state(1.0)
    assert not state_problem(good)
    assert "q" in state_problem(state(math.nan))
    assert "momentum" in state_problem(ServerState(good.adapter, 1, {"momentum": torch.tensor([math.inf])}))
    whole, spoilt = torch.ones(1, 1), torch.tensor([[math.nan]])
    for moved in (Product(whole, spoilt), Product(spoilt, whole)):
        assert "base q" in state_problem(ServerState(good.adapter, 1, {}, (Piece(1, {"q": moved}),)))


def test_a_lone_update_leads_to_no_state_that_a_continued_run_would_not_take() -> None:
    lone = [update(0)]
    assert aggregated(Step({0}, 1.5 * LARGEST), lone).state is not None
    assert aggregated(Step({0}, 3 * LARGEST), lone).state is None
