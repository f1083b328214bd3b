"""How far colluding clients can move the model: no further than docs/methods/README.md says of each rule.

The search knows what honest clients send, and tries every number of malicious clients that the settings accept.
"""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import Config
from fedtune.config.schema import RobustSettings
from fedtune.federation.guard import Aggregated, aggregated
from fedtune.lora.state import A, B
from fedtune.methods import ClientUpdate, RoundContext, ServerState, create, problems
from fedtune.methods.wrappers import rules
from tests.methods.test_robust import BOUNDING, SOUND, _trained, alone, config, model, started

CUT = ("flexlora", "hlora", "florist")  # keep the r largest directions of the mean
PLANS = ("same", "opposite", "axis", "orthogonal", "chain", "cluster", "anywhere")
MOST = 10  # malicious clients
LARGE = 48.0  # of a factor: two of them make a product that is nearly as large as is taken


def promised(rule: str, n: int, f: int, left: float = 0.01) -> float:
    """Return how far from the honest updates' mean the result may be, in the largest distance between two of them.

    What is `left` of one client's pull on the geometric median counts as more malicious clients.
    """
    if rule in ("krum", "multi-krum"):
        return 1 + math.sqrt((n - f - 2) / (n - 2 * f - 1))
    if rule == "geometric-median":
        return (n - f) / math.sqrt((n - f) ** 2 - (f + left) ** 2)
    if rule == "trimmed":
        return 1 + 2 * f / math.sqrt((n - f) ** 2 - (f + left) ** 2)
    assert rule == "dnc"
    return (math.sqrt(n) + math.sqrt(f)) * math.sqrt(n - f) / (n - 2 * f)


def coordinates(plan: str, f: int, seed: int) -> list[tuple[float, float, float]]:
    """Return where colluders stand, in units of their size, along three directions."""
    drawn = random.Random(seed)
    places = []
    for i in range(f):
        sign, axis = 1 - 2 * (i % 2), i % 3
        if plan == "same":
            place = (1.0, 0.0, 0.0)
        elif plan == "opposite":
            place = (float(sign), 0.0, 0.0)
        elif plan == "axis":  # one far away, the others near the mean along the direction to it
            place = (1.0, 0.0, 0.0) if i == 0 else (drawn.uniform(0.1, 0.6), drawn.uniform(0.3, 0.8) * sign, 0.0)
        elif plan == "orthogonal":
            place = (float(axis == 0), float(axis == 1), float(axis == 2))
        elif plan == "chain":
            place = (drawn.uniform(0.3, 0.9) ** i, drawn.uniform(0.3, 0.9) ** i * 0.5, 0.0)
        elif plan == "cluster":
            place = (1.0, drawn.uniform(-0.05, 0.05), drawn.uniform(-0.05, 0.05))
        else:
            place = (drawn.uniform(-1, 1), drawn.uniform(-1, 1), drawn.uniform(-1, 1))
        places.append(place)
    return places


def colluding(
    honest: list[dict[str, Tensor]], size: float, plan: str, f: int, seed: int, *, along: bool, tall: bool
) -> list[dict[str, Tensor]]:
    """Return what colluders send: one honest update and a change of one layer's B, in which products are linear.

    Args:
        honest: the tensors of all honest clients.
        size: norm of the change.
        plan: of the colluders.
        f: how many.
        seed: of the plan.
        along: the first direction is that between two honest updates, not one of its own.
        tall: the row of A that B's change meets is as large as it may be, where clients send A.
    """
    middle = honest[0]
    name = min(n for n in middle if n.endswith(B))
    directions = [torch.zeros_like(middle[name]) for _ in range(3)]
    for row, direction in enumerate(directions):
        direction[row, 0] = 1.0
    if along and float((apart := honest[1][name] - middle[name]).norm()) > 0:
        directions[0] = apart / apart.norm()
    if tall and (row_of := name.replace(B, A)) in middle:
        middle = {**middle, row_of: middle[row_of].clone()}
        middle[row_of][0, 0] += LARGE
    return [
        {**middle, name: middle[name] + size * sum(x * d for x, d in zip(place, directions, strict=True))}
        for place in coordinates(plan, f, seed)
    ]


def attempt(
    name: str, chosen: dict[str, Any], n: int, f: int, step: float, size: float, plan: str, seed: int
) -> tuple[Tensor, ServerState, Aggregated]:
    """Return the models of honest clients alone, the state before the round, and what the round came to."""
    made = create(_accepted(name, chosen, n, f))
    state = started(made)
    honest = [ClientUpdate(c, _trained(made, state, c, 2, step), 10.0) for c in range(f, n)]
    moved = step * math.sqrt(sum(t.numel() for t in honest[0].tensors.values()))
    lies = colluding(
        [dict(u.tensors) for u in honest],
        min(moved * size, LARGE),
        plan,
        f,
        seed,
        along=seed % 2 == 0,
        tall=seed % 4 > 1,
    )
    updates = [ClientUpdate(c, lie, 10.0) for c, lie in enumerate(lies)] + honest
    found = aggregated(lambda some: made.server_step(some, state, RoundContext(2)), updates)
    return torch.stack([alone(made, state, u, 2) for u in honest]), state, found


def _accepted(name: str, chosen: dict[str, Any], n: int, f: int) -> Config:
    made = config(name, {**chosen, "malicious": f}, federation={"clients": n})
    assert not list(problems(made)), [str(p) for p in problems(made)]
    return made


def rounding(models: Tensor) -> float:
    """Return what float32 factors leave of a model's size."""
    return 3e-6 * float(models.norm(dim=1).max())


SEARCH = (
    st.sampled_from(SOUND),
    st.integers(1, MOST),
    st.integers(0, 3),
    st.sampled_from([0.01, 0.05, 0.3]),
    st.sampled_from([0.3, 1.0, 3.0, 30.0, math.inf]),
    st.sampled_from(PLANS),
    st.integers(0, 99),
)


@pytest.mark.parametrize("rule", BOUNDING)
@settings(deadline=None, max_examples=30)
@given(*SEARCH)
@example("ffa_lora", 2, 0, 0.05, math.inf, "axis", 1)
@example("flora", 10, 0, 0.01, math.inf, "same", 3)
def test_colluders_move_the_model_no_further_than_their_rule_promises(
    rule: str, name: str, f: int, more: int, step: float, size: float, plan: str, seed: int
) -> None:
    n = rules.fewest(RobustSettings(rule=rule, malicious=f)) + more
    honest, _, found = attempt(name, {"rule": rule}, n, f, step, size, plan, seed)
    assert found.state is not None, found.note
    assert not found.rejected, found.rejected
    most = promised(rule, n, f) * float(torch.cdist(honest, honest).max())
    if name in CUT:  # what is cut off is no more than the distance to any one update
        most = 2 * most + float(torch.cdist(honest, honest).max())
    assert float((model(found.state) - honest.mean(0)).norm()) <= most + rounding(honest)


@settings(deadline=None, max_examples=30)
@given(*SEARCH)
def test_colluders_move_the_model_no_further_than_the_farthest_honest_client_under_a_clip_at_the_median(
    name: str, f: int, more: int, step: float, size: float, plan: str, seed: int
) -> None:
    honest, state, found = attempt(name, {"clip_norm": "median"}, 2 * f + 1 + more, f, step, size, plan, seed)
    assert found.state is not None, found.note
    before = model(state)
    farthest = float((honest - before).norm(dim=1).max())
    moved = float((model(found.state) - before).norm())
    assert moved <= (1 + (name in CUT)) * farthest + rounding(honest)


def scattered(kind: str, count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return honest updates as points [count, dim] with a spread of about 1."""
    points = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    one = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    if kind == "line":
        return one * torch.ones(dim, dtype=torch.float64)
    if kind == "two groups":
        return points * 0.01 + one.sign()
    if kind == "one point":
        return points[:1].expand(count, dim)
    return points * one.abs() ** 3 if kind == "heavy tails" else points


@pytest.mark.parametrize("rule", BOUNDING)
@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, MOST),
    st.integers(0, 3),
    st.sampled_from(["a ball", "line", "two groups", "one point", "heavy tails"]),
    st.sampled_from([3, 40]),
    st.sampled_from([0.1, 0.5, 1.0, 2.0, 1e2, 1e4, 1e6]),
    st.sampled_from([0.0, 1.0, 100.0]),
    st.sampled_from(PLANS),
    st.integers(0, 9999),
)
def test_a_rule_keeps_its_promise_however_honest_updates_lie(
    rule: str, f: int, more: int, kind: str, dim: int, size: float, shift: float, plan: str, seed: int
) -> None:
    n = rules.fewest(RobustSettings(rule=rule, malicious=f)) + more
    generator = torch.Generator().manual_seed(seed)
    honest = scattered(kind, n - f, dim, generator) + shift
    centre = honest.mean(0)
    directions = torch.eye(dim, dtype=torch.float64)[:3]
    if seed % 2:  # the main directions of the honest ones
        directions = torch.linalg.svd(honest - centre)[2][:3]
    places = torch.tensor(coordinates(plan, f, seed), dtype=torch.float64)
    points = torch.cat([centre + size * places @ directions, honest])
    weights = rules.RULES[rule](points @ points.T, torch.ones(n).double(), RobustSettings(rule=rule, malicious=f))
    spread = float((honest[:, None] - honest[None]).norm(dim=2).max())
    moved = float((weights @ points / weights.sum() - centre).norm())
    assert moved <= promised(rule, n, f) * spread + 1e-6 * float(honest.norm(dim=1).max())


def test_foolsgold_promises_nothing_of_colluders_that_differ() -> None:
    honest = torch.randn(4, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    far = 1e4 * torch.eye(40, dtype=torch.float64)[:1]
    points = torch.cat([far, honest])
    weights = rules.foolsgold(points @ points.T, torch.ones(5).double(), RobustSettings())
    spread = float((honest[:, None] - honest[None]).norm(dim=2).max())
    assert float((weights @ points / weights.sum() - honest.mean(0)).norm()) > 100 * spread


@pytest.mark.parametrize("rule", ["geometric-median", "trimmed"])
def test_a_median_that_still_moves_is_never_used(rule: str) -> None:
    _, _, found = attempt("flora", {"rule": rule, "iterations": 1}, 21, 10, 0.01, math.inf, "same", 3)
    assert found.state is None
    assert "the geometric median still moves after robust.iterations = 1" in found.note


def slowing(f: int, more: float) -> tuple[Tensor, Tensor]:
    """Return honest updates, and all: with colluders in a small cluster where the honest pull is f and a little more."""
    drawn = torch.Generator().manual_seed(0)
    honest, apart = (torch.randn(k, 40, generator=drawn, dtype=torch.float64) for k in (f + 1, f))
    centre, (low, high) = honest.mean(0), (0.0, 1e4)
    for _ in range(60):
        middle = (low + high) / 2
        away = honest - centre - middle * torch.eye(40, dtype=torch.float64)[0]
        strong = float((away / away.norm(dim=1, keepdim=True)).sum(0).norm()) >= f + more
        low, high = (low, middle) if strong else (middle, high)
    place = centre + low * torch.eye(40, dtype=torch.float64)[0]
    return honest, torch.cat([place + 1e-6 * (apart - apart.mean(0)), honest])


@pytest.mark.parametrize("rule", rules.ITERATING)
@pytest.mark.parametrize(("f", "more"), [(6, 2e-3), (10, 2e-3), (10, 9e-3), (10, 1.2e-2), (10, 5e-2)])
def test_colluders_that_slow_the_geometric_median_down_do_not_stop_the_round(rule: str, f: int, more: float) -> None:
    honest, points = slowing(f, more)
    n, notes = len(points), list[str]()
    chosen = RobustSettings(rule=rule, malicious=f)
    weights = rules.RULES[rule](points @ points.T, torch.ones(n).double(), chosen, note=notes.append)
    moved = float((weights @ points / weights.sum() - honest.mean(0)).norm())
    assert moved <= promised(rule, n, f, 0.1 if notes else 0.01) * float(torch.cdist(honest, honest).max())


@pytest.mark.parametrize("rule", rules.ITERATING)
def test_a_median_that_nearly_stands_still_is_used_and_noted(rule: str) -> None:
    _, points = slowing(10, 1.2e-2)
    notes = list[str]()
    chosen = RobustSettings(rule=rule, malicious=10, iterations=300)
    rules.RULES[rule](points @ points.T, torch.ones(21).double(), chosen, note=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("the geometric median still moves after robust.iterations = 300, pulled by 0.0")


@pytest.mark.parametrize("rule", rules.ITERATING)
@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-3, 3e-3])
def test_two_colluders_far_away_on_either_side_do_not_make_the_mean_the_median(rule: str, apart: float) -> None:
    """From where they are, all others seem to be one point."""
    axes = torch.eye(40, dtype=torch.float64)
    honest = 0.1 * axes[2] + 1e-5 * torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double()
    centre = honest.mean(0)
    points = torch.cat([torch.stack([centre + 1e4 * axes[0], centre - 1e4 * axes[0] + apart * axes[1]]), honest])
    chosen = RobustSettings(rule=rule, malicious=2)
    weights = rules.RULES[rule](points @ points.T, torch.ones(5).double(), chosen)
    spread = float((honest[:, None] - honest[None]).norm(dim=2).max())
    assert float((weights @ points / weights.sum() - centre).norm()) <= promised(rule, 5, 2) * spread + 1e-7


def test_a_colluder_near_the_mean_of_the_main_direction_is_dropped_as_well() -> None:
    points = torch.zeros(5, 2, dtype=torch.float64)
    points[0, 0], points[1, 0], points[1, 1] = 100.0, 50.0, 60.0
    weights = rules.dnc(points @ points.T, torch.ones(5).double(), RobustSettings(malicious=2))
    assert weights.tolist() == [0, 0, 1, 1, 1]
