"""Which numbers of an update a server half takes: finite ones, none absurdly large.

Products of such numbers stay far inside float32's range, so no aggregation overflows, divides by zero or hands NaN to
LAPACK because of what one client sent. A layer's product may grow by no more than a product of factors that have both
grown as far as they may: an SVD makes factors of its size, from which the clients of the next round start.

How far a client may go is always counted from what it was sent, so whoever starts from an accepted state and trains
honestly is never refused for where it started.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from fedtune.lazy import torch
from fedtune.lora.product import size
from fedtune.lora.state import AdapterState

if TYPE_CHECKING:
    from fedtune.config.schema import TrainSettings
    from fedtune.methods.requests import Tensors

LARGEST = 1e9
# how much larger (Frobenius norm) a tensor may be than what the client was sent. Trained factors have norms of 0.1 to
# 100 in the end, and a step of AdamW moves a tensor of n numbers by about sqrt(n) times the learning rate: a round of
# FlowerTune's recipe moves a factor by 0.2
GROWTH = 100.0
# of what leaves no more than a direction in the model: sketches
LOOSE = 1e4
# in medians of a round: how much of a client's own norm counts where that norm would set its weight
OUTLYING = 2.0
# of the way that a round's steps can make in exact arithmetic: rounding weights to bfloat16 doubles a small step at
# most, and AdamW's moments are rounded to it as well
MARGIN = 4.0


class Reach(NamedTuple):
    """How far a round's steps can carry a weight: as weight decay can each number, and the rest within a norm.

    Attributes:
        order: of the norm: infinity bounds every number of a tensor, 2 all of them together.
        most: what gradients can make: the norm of the change without what decay can have made of it.
        share: of each number, what weight decay can make.
    """

    order: float
    most: float
    share: float


@cache
def _adam(beta1: float, beta2: float, steps: int) -> float:
    """Return how far steps of Adam carry a number at a rate of 1 at most.

    Its step m/sqrt(v) has m = sum a_i g_i and v = sum b_i g_i^2, so it is at most sqrt(sum a_i^2/b_i) (Cauchy-Schwarz).
    """
    ratio = beta1**2 / beta2 if beta2 else math.inf if beta1 else 0.0
    far, terms = 0.0, 1.0
    for step in range(1, steps + 1):
        far += (1 - beta1) / (1 - beta1**step) * math.sqrt((1 - beta2**step) / (1 - beta2) * terms)
        terms = terms * ratio + 1
    return far


def reach(train: TrainSettings, rate: float, steps: int) -> Reach:
    """Return how far so many steps at a rate can carry a weight; no honest client comes further."""
    share = math.expm1(min(MARGIN * rate * steps * train.weight_decay, 50.0))
    clipped = steps * train.max_grad_norm
    if train.optimizer == "sgd":
        return Reach(2.0, MARGIN * rate * clipped * (1 + share), share)
    far = min(_adam(train.adam_beta1, train.adam_beta2, steps), clipped / train.adam_epsilon)
    return Reach(math.inf, MARGIN * rate * far * (1 + share), share)


def change_problem(tensors: Tensors, start: Tensors, within: Reach) -> str:
    """Say which weight has moved further than a round's steps can carry it, or return an empty string.

    Args:
        tensors: what a client sent; what it was not sent is passed over.
        start: what it was sent.
        within: what is possible.
    """
    for name in (n for n in tensors if n in start):
        before = start[name].float()
        beyond = ((tensors[name].float() - before).abs() - within.share * before.abs()).clamp(min=0)
        moved = float(torch.linalg.vector_norm(beyond, within.order))
        if not moved <= within.most:
            what = "a number" if within.order == math.inf else "the tensor"
            rest = " beyond what weight decay can" if within.share else ""
            return f"{name}: {what} has moved by {moved:.3g}{rest}; a round's steps reach {within.most:.3g}"
    return ""


def number_problem(tensors: Tensors) -> str:
    """Say which tensor has a number that is not finite or absurdly large, or return an empty string."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        largest = float(torch.linalg.vector_norm(tensor, math.inf))
        if not largest <= LARGEST:
            return f"{name} has a number of size {largest:.3g}; at most {LARGEST:g} is taken"
    return ""


def product_problem(adapter: AdapterState, before: AdapterState, growth: Callable[[str], float]) -> str:
    """Say which layer's product has grown by more than `growth`, by path, or return an empty string."""
    for path, module in adapter.items():
        norm, limit = size(module), size(before[path]) + growth(path)
        if norm > limit:
            return f"{path}: the product has norm {norm:.3g}; at most {limit:.3g} is taken"
    return ""


def capped(norms: Sequence[float]) -> list[float]:
    """Return the norms of a round's clients, none more than `OUTLYING` times their median."""
    most = OUTLYING * statistics.median(norms)
    return [min(norm, most) for norm in norms]
