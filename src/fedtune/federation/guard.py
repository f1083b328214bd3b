"""Aggregation that no client's update can break: whoever makes it fail is left out, and the others still count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.lora.state import to_tensors
from fedtune.methods import ClientUpdate, ServerState, sound
from fedtune.types import Rejection, RunFailedError, UpdateError, last_line

# no step that can be taken apart leaves a tensor of a larger Frobenius norm: far above any trained model, and so far
# below what the methods refuse of a client that those who start from it are never refused for its sake
LARGEST = sound.LARGEST / 2
# how many ways of leaving clients out are tried of each kind
TRIES = 8

Step = Callable[[Sequence[ClientUpdate]], ServerState]


@dataclass(frozen=True)
class Aggregated:
    """What a server step came to.

    Attributes:
        state: the new state; None if there is none, whoever is left out.
        rejected: the clients that had to be left out.
        note: what went wrong, if anything did.
    """

    state: ServerState | None
    rejected: tuple[Rejection, ...] = ()
    note: str = ""


def state_problem(state: ServerState, largest: float = LARGEST) -> str:
    """Say what makes a state one that must not be accepted: NaN, infinity, or absurdly large numbers; else nothing."""
    newest = state.base[-1:]  # the pieces before were looked at when they were new
    products = {
        f"base {path} ({end})": getattr(p, end)
        for piece in newest
        for path, p in piece.products.items()
        for end in ("left", "right")
    }
    for name, tensor in {**to_tensors(state.adapter), **products}.items():
        norm = float(torch.linalg.vector_norm(tensor.float()))
        if not (norm <= largest and norm < math.inf):
            return f"{name} would have norm {norm:.3g}, at most {largest:g} is accepted"
    bad = [n for n, t in state.carried().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    return f"{bad[0]} would have NaN or infinity" if bad else ""


def _tried(step: Step, updates: Sequence[ClientUpdate]) -> ServerState | Exception:
    """Return the state a step gives, or why it gives none."""
    try:
        state = step(updates)
    except Exception as err:  # LAPACK's, torch's, memory's: whatever one client's numbers can lead to
        return err
    # the sum of all cannot be taken apart; how far it reaches is bounded by what the screening lets in, and what is
    # kept is what a continued run takes
    problem = state_problem(state, LARGEST if len(updates) > 1 else sound.LARGEST)
    return ValueError(problem) if problem else state


def _size(update: ClientUpdate) -> float:
    """Return an update's norm, for an order in which the culprit most often comes first."""
    norms: list[Tensor] = [torch.linalg.vector_norm(t.double()) for t in update.tensors.values()]
    return max(map(float, norms), default=0.0)


def _suspects(updates: Sequence[ClientUpdate]) -> Iterator[tuple[int, ...]]:
    """Yield whom to leave out: each client alone, the largest update first; then the largest two, three ... together.

    Never more than half of them: what only a minority can agree on is not aggregated.
    """
    order = [u.client for u in sorted(updates, key=lambda u: (-_size(u), u.client))]
    most = len(order) // 2
    yield from ((client,) for client in order[: TRIES if most else 0])
    yield from (tuple(order[:count]) for count in range(2, min(most, TRIES) + 1))


def aggregated(step: Step, updates: Sequence[ClientUpdate]) -> Aggregated:
    """Take a server step, without those clients whose updates make it fail.

    Args:
        step: the state that updates lead to.
        updates: of the round; one that stands for the sum of all cannot be taken apart.
    """
    left, rejected = list(updates), list[Rejection]()
    while True:
        found = _tried(step, left)
        if not isinstance(found, Exception):
            return Aggregated(found, tuple(rejected))
        if isinstance(found, RunFailedError):  # too few updates, and nothing gets better with fewer
            return Aggregated(None, tuple(rejected), last_line(str(found)))
        if not isinstance(found, UpdateError) or found.client not in {u.client for u in left} or len(left) == 1:
            break
        rejected.append(Rejection(found.client, "aggregation", last_line(found.detail)))
        left = [u for u in left if u.client != found.client]
    why = f"{type(found).__name__}: {last_line(str(found))}"
    for suspects in _suspects(left):
        second = _tried(step, [u for u in left if u.client not in suspects])
        if not isinstance(second, Exception):
            lost = [Rejection(c, "aggregation", f"with it the server step fails: {why}") for c in suspects]
            return Aggregated(second, (*rejected, *lost))
    return Aggregated(None, tuple(rejected), f"the server step failed, whoever was left out: {why}")
