"""FedKSeed: zeroth-order steps along K seeded directions; only K scalars travel (arXiv 2312.06353).

w = w_0 - lr sum_j G_j z(seed_j): a step takes the difference of two losses along z_j, and G_j sums up what all
clients found for direction j. Everybody replays the same sum in the same order in float32 on the CPU, so replays
agree bit for bit. The paper moves all weights of the model, which is `peft.kind = "full"`; by default w is the adapter.
The learning rate is constant: a schedule or weight decay would break the replay.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.lazy import torch
from fedtune.lora.state import as_kept, to_tensors, with_tensors
from fedtune.methods.base import ANY, Method
from fedtune.methods.requests import ClientContext, Fitted, Losses, Program, Tensors
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Sizes, Upload, mean
from fedtune.types import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config

_SCALARS, _START = "fedkseed/scalars", "fedkseed/start/"
# in medians of a round: how steep a client's slopes count at most, so that no reply moves all weights at once. Slopes
# along random directions are about normal, with the gradient's norm: those of honest clients differ by less
STEEPEST = 5.0
OF_STEPS = (
    *("train.optimizer", "train.learning_rate_max", "train.learning_rate_min", "train.max_grad_norm"),
    *("train.weight_decay", "train.adam_beta1", "train.adam_beta2", "train.adam_epsilon"),
    *("drift.proximal_mu", "lora.dropout"),
)


class FedKSeed(Method):
    """Replayed scalars."""

    name = "fedkseed"
    title = "FedKSeed"
    paper = "arXiv:2312.06353"
    spaces = ANY
    updates = "opaque"
    steady = False

    class Parameters(Method.Parameters):
        """`seeds`: K; `epsilon`: half the way between the two losses; `steps`: 0 for as many as a round has."""

        seeds: int = Field(4096, ge=1)
        epsilon: float = Field(1e-2, gt=0)
        learning_rate: float = Field(5e-5, gt=0)
        steps: int = Field(0, ge=0)

        def idle(self, config: Config) -> Iterator[tuple[str, str]]:
            """Name the settings of optimiser steps."""
            yield from ((key, "fedkseed makes no optimiser steps, only losses are computed") for key in OF_STEPS)

    parameters: Parameters

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """K scalars for the whole model, next to nothing for one module."""
        return 0.0, 0.0

    def direction(self, number: int, like: Tensors) -> dict[str, Tensor]:
        """Return direction z_j in float32, drawn on the CPU in the order of names."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "direction", number))
        return {n: torch.randn(like[n].shape, generator=generator) for n in sorted(like)}

    def replay(self, start: Tensors, scalars: Tensor) -> dict[str, Tensor]:
        """Return w_0 - lr sum_j G_j z_j, in ascending j; directions nobody took cost nothing."""
        now = {n: t.clone() for n, t in start.items()}
        for number in scalars.nonzero()[:, 0].tolist():
            step = self.parameters.learning_rate * float(scalars[number])
            for name, z in self.direction(number, start).items():
                now[name].sub_(z.to(now[name].dtype), alpha=step)
        return now

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Replay the sums so far on the run's initial adapter, as the server does, in float32."""
        return self.replay(to_tensors(as_kept(client.layout)), download[_SCALARS])

    def _chance(self, client: int, round_: int) -> random.Random:
        """Return what draws the directions of a client's steps in a round, one after the other."""
        return random.Random(derive_seed(self.seed, "walk", client, round_))

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Walk along random directions; send what was found for each."""
        own, found = self.parameters, torch.zeros(self.parameters.seeds)
        chance = self._chance(client.client, client.round)
        now = {n: t.clone() for n, t in start.items()}
        for step in range(own.steps or client.steps):
            number = chance.randrange(own.seeds)
            z = self.direction(number, now)
            ends = [{n: t.add(z[n], alpha=sign * own.epsilon) for n, t in now.items()} for sign in (1, -1)]
            plus, minus = yield Losses(step % client.steps, ends)
            slope = torch.tensor((plus - minus) / (2 * own.epsilon), dtype=torch.float32)
            found[number] += slope
            for name, tensor in now.items():
                tensor.sub_(z[name], alpha=own.learning_rate * float(slope))
        return Fitted({_SCALARS: found})

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Add the mean of the scalars, and replay. Without a run there is no walk, and adapters are averaged."""
        if not self.in_run:
            return super().server_step(updates, state, context)
        start = {n.removeprefix(_START): t for n, t in state.extra.items() if n.startswith(_START)}
        start = start or to_tensors(state.adapter)
        total = self._scalars(state) + mean(self._capped(updates))[_SCALARS]
        extra = {**state.extra, _SCALARS: total, **{_START + n: t for n, t in start.items()}}
        adapter = with_tensors(state.adapter, self.replay(start, total))
        return replace(state, adapter=adapter, round=context.round, extra=extra)

    def _capped(self, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """Return updates none of which is steeper than `STEEPEST` times the median of those that found any slope.

        The sum over n random directions grows as the root of n, so clients that make more steps are not cut.
        """
        steps = [self.parameters.steps or max(1, u.steps) for u in updates]
        steep = [float(u.tensors[_SCALARS].norm()) / math.sqrt(n) for u, n in zip(updates, steps, strict=True)]
        # the lower of two: where but two found any, one of them may be the attacker
        most = STEEPEST * statistics.median_low([s for s in steep if s] or [0.0])
        return [
            u if s <= most else replace(u, tensors={_SCALARS: u.tensors[_SCALARS] * (most / s)})
            for u, s in zip(updates, steep, strict=True)
        ]

    def _scalars(self, state: ServerState) -> Tensor:
        return state.extra.get(_SCALARS, torch.zeros(self.parameters.seeds))

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send the K sums."""
        return {_SCALARS: self._scalars(state)}

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Expect K scalars.

        Slopes may be steep: the server step cuts them by the round's median. They are added to the sums, so their bound
        does not depend on how large these are.
        """
        taken, size = self.parameters.steps or steps, self.parameters.seeds

        def problem(sent: Tensors) -> str:
            """Name a slope along a direction that the client's steps do not take: every later replay would pay."""
            chance = self._chance(client, round_)
            own = {chance.randrange(size) for _ in range(taken)}
            others = set(sent[_SCALARS].nonzero()[:, 0].tolist()) - own
            if not others:
                return ""
            return f"{_SCALARS}: slopes along {len(others)} directions, as {min(others)}, that its steps do not take"

        whole = super().upload(state, client, round_, taken)
        return replace(whole, tensors={_SCALARS: torch.zeros(size)}, growth=lambda name: 1e3, problem=problem)
