"""What rules and clips bound holds of the state that the server keeps, however coarse the weights that travel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune import methods
from fedtune.config.schema import TrainSettings
from fedtune.lora.state import AdapterState, Plain, to_tensors
from fedtune.methods import Algorithm, ClientUpdate, RoundContext
from fedtune.methods.requests import Tensors, Train
from fedtune.models.load import LoadedModel
from fedtune.models.proof import prove
from fedtune.models.whole import attach
from fedtune.objectives import Example
from fedtune.settings import load
from fedtune.training.executor import Sequential, Work
from tests import architectures

SPACING = 2**-7  # of bfloat16 from 1 to 2
SIZE = 4096
KINDS = [torch.bfloat16, torch.float32]
# beyond float32's own rounding of weights of 1
EXACT = 1 + 1e-3


def algorithm(clients: int, **robust: Any) -> Algorithm:
    """Return the mean of whole weights with a rule or a clip."""
    federation = {"clients": clients, "fraction": 1.0}
    return methods.create(
        load([{"domain": "finance", "peft": {"kind": "full"}, "robust": robust, "federation": federation}]).config
    )


def ones(dtype: torch.dtype) -> AdapterState:
    """Return weights of 1."""
    return Plain("full", {"w": torch.ones(SIZE, dtype=dtype)})


def distance(one: Tensors, other: Tensors) -> float:
    """Return the norm of a difference."""
    return float(sum((one[n].double() - other[n].double()).square().sum() for n in one)) ** 0.5


def rounds(made: Algorithm, start: AdapterState, moves: list[Tensor]) -> list[tuple[float, list[float]]]:
    """Return how far the server's state moves in each of three rounds, and how far each reply is from what was sent."""
    state, found = made.initial(start), []
    for round_ in (1, 2, 3):
        sent = made.view(state, 0)
        replies = [{"w": sent["w"] + move.to(sent["w"].dtype)} for move in moves]
        before = to_tensors(state.adapter)
        state = made.server_step([ClientUpdate(c, r, 8.0) for c, r in enumerate(replies)], state, RoundContext(round_))
        found.append((distance(to_tensors(state.adapter), before), [distance(r, sent) for r in replies]))
    return found


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("clip", [0.24, 0.26, 0.01])
def test_a_clip_bounds_the_move_and_leaves_one(dtype: torch.dtype, clip: float) -> None:
    """Three honest clients, and one that sends a hundred times as much in the same direction."""
    moves = [torch.full((SIZE,), SPACING * share) for share in (1, 1, 1, 100)]
    for moved, _ in rounds(algorithm(4, clip_norm=clip), ones(dtype), moves):
        assert 0.99 * clip < moved <= clip * EXACT


@pytest.mark.parametrize("dtype", KINDS)
def test_a_clip_at_the_median_bounds_the_move_by_the_farthest_honest_update(dtype: torch.dtype) -> None:
    first, second = torch.zeros(SIZE), torch.zeros(SIZE)
    first[: SIZE // 2], second[SIZE // 2 :] = SPACING, SPACING
    made = algorithm(3, clip_norm="median", malicious=1)
    for size in (1, 100):
        for moved, changes in rounds(made, ones(dtype), [first, second, torch.full((SIZE,), size * SPACING)]):
            assert 0 < moved <= max(changes[:2]) * EXACT


@pytest.mark.parametrize("rule", ["krum", "multi-krum", "geometric-median", "trimmed", "dnc"])
def test_what_a_rule_makes_of_bfloat16_is_what_it_makes_of_the_same_changes_in_float32(rule: str) -> None:
    drawn = torch.Generator().manual_seed(0)
    moves = [SPACING * torch.randint(-2, 3, (SIZE,), generator=drawn) for _ in range(5)] + [torch.full((SIZE,), 0.5)]
    coarse, fine = (rounds(algorithm(6, rule=rule, malicious=1), ones(dtype), moves)[0] for dtype in KINDS)
    assert coarse[0] == pytest.approx(fine[0], rel=1e-6)


@pytest.mark.parametrize("dtype", KINDS)
def test_the_mean_of_trained_updates_is_clipped_to_the_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = architectures.tiny(architectures.causal_configs()["llama"], scale=0.1).to(dtype)
    model.requires_grad_(False)
    prove(model)
    adapted = attach(LoadedModel(model, None, "x", "y"), "full")
    sent = algorithm(4, clip_norm=1.0).view(algorithm(4, clip_norm=1.0).initial(adapted.layout), 0)
    texts, train = [[Example.labelled(range(10, 40), 5)]] * 3, TrainSettings(max_grad_norm=1.0)
    rates = [1e-5 * (1 + 0.01 * client) for client in range(4)]
    replies = [Sequential(adapted).run(Work(Train(sent, list(sent)), texts, rate, train, 0, True)) for rate in rates]
    least = min(distance(reply, sent) for reply in replies)
    for share in (0.9, 0.55, 0.3):
        made = algorithm(4, clip_norm=share * least)
        state = made.initial(adapted.layout)
        after = made.server_step([ClientUpdate(c, r, 8.0) for c, r in enumerate(replies)], state, RoundContext(1))
        moved = distance(to_tensors(after.adapter), to_tensors(state.adapter))
        assert 0.9 * share * least < moved <= share * least * EXACT
