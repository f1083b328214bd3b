"""FedKSeed: zeroth-order steps along K seeded directions; only K scalars travel (arXiv 2312.06353).

w = w_0 - lr sum_j G_j z(seed_j): a step takes the difference of two losses along z_j, and G_j sums up what all
clients found for direction j. Everybody replays the same sum in the same order in float32 on the CPU, so replays
agree bit for bit. The paper moves all weights of the model, which is `peft.kind = "full"`; by default w is the adapter.
The learning rate is constant: a schedule or weight decay would break the replay.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.methods.base import ANY, Method
from fedtune.methods.requests import ClientContext, Fitted, Losses, Program, Tensors
from fedtune.methods.state import ClientUpdate, ServerState, Sizes
from fedtune.types import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState

_SCALARS, _START = "fedkseed/scalars", "fedkseed/start/"


class FedKSeed(Method):
    """Replayed scalars."""

    name = "fedkseed"
    title = "FedKSeed"
    paper = "arXiv:2312.06353"
    stateful = True
    factors = False
    comparable = False
    pairs = False
    optimises = False
    spaces = ANY

    class Parameters(Method.Parameters):
        """`seeds`: K; `epsilon`: half the way between the two losses; `steps`: 0 for as many as a round has."""

        seeds: int = Field(4096, ge=1)
        epsilon: float = Field(1e-2, gt=0)
        learning_rate: float = Field(5e-5, gt=0)
        steps: int = Field(0, ge=0)

    parameters: Parameters

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """K scalars for the whole model, next to nothing for one module."""
        return 0.0, 0.0

    def direction(self, number: int, like: Tensors) -> dict[str, Tensor]:
        """Return direction z_j in float32, drawn on the CPU in the order of names."""
        import torch

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

    def begin(self, layout: AdapterState, download: Tensors, kept: Tensors, round_: int) -> dict[str, Tensor]:
        """Replay the sums so far on the run's initial adapter, as the server does, in float32."""
        from fedtune.lora.state import kept as wide
        from fedtune.lora.state import to_tensors

        return self.replay(to_tensors(wide(layout)), download[_SCALARS])

    def losses(self, steps: int) -> int:
        """Count the steps of the walk."""
        return self.parameters.steps or steps

    def _chance(self, client: int, round_: int) -> random.Random:
        """Return what draws the directions of a client's steps in a round, one after the other."""
        return random.Random(derive_seed(self.seed, "walk", client, round_))

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Walk along random directions; send what was found for each."""
        import torch

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

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Add the mean of the scalars, and replay."""
        from fedtune.lora.state import to_tensors, with_tensors

        start = {n.removeprefix(_START): t for n, t in state.extra.items() if n.startswith(_START)}
        start = start or to_tensors(state.adapter)
        total = self._scalars(state) + self.combine(updates, state)[_SCALARS]
        extra = {**state.extra, _SCALARS: total, **{_START + n: t for n, t in start.items()}}
        adapter = with_tensors(state.adapter, self.replay(start, total))
        return replace(state, adapter=adapter, round=round_, extra=extra)

    def _scalars(self, state: ServerState) -> Tensor:
        import torch

        return state.extra.get(_SCALARS, torch.zeros(self.parameters.seeds))

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send the K sums."""
        return {_SCALARS: self._scalars(state)}

    def expected(self, state: ServerState, client: int, round_: int) -> dict[str, Tensor]:
        """Expect K scalars. They are added to the sums, so their bound does not depend on how large these are."""
        import torch

        return {_SCALARS: torch.zeros(self.parameters.seeds)}

    def growth(self, name: str) -> float:
        """Let slopes be steep: a thousand moves the adapter by 0.05 a number at the default learning rate."""
        return 1e3

    def flaw(self, update: Tensors, state: ServerState, client: int, round_: int, steps: int) -> str:
        """Name a slope along a direction that the client's steps do not take: every later replay would pay for it."""
        chance = self._chance(client, round_)
        taken = {chance.randrange(self.parameters.seeds) for _ in range(self.losses(steps))}
        others = set(update[_SCALARS].nonzero()[:, 0].tolist()) - taken
        if not others:
            return ""
        return f"{_SCALARS}: slopes along {len(others)} directions, as {min(others)}, that its steps do not take"

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Average the adapters: what the replay of the clients' mean scalars gives."""
        from fedtune.methods.fedit import FedIT

        return FedIT(FedIT.Parameters()).aggregate(clients, examples, state, round_)
