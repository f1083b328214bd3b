"""Honest clients that move apart are accepted in every round, also where replies are lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune import methods
from fedtune.config.schema import FaultSettings
from fedtune.federation.checkpoint import Progress
from fedtune.federation.faults import FaultyGrid
from fedtune.federation.local import LocalGrid
from fedtune.federation.nodes import connect
from fedtune.federation.pool import complete
from fedtune.federation.rounds import Federation, one_round
from fedtune.lora.product import size
from fedtune.lora.state import LoraModule, to_tensors
from fedtune.methods import ClientUpdate, RoundContext
from fedtune.settings import load
from tests.faults.hostile import Toy, clients

CLIENTS, STEP = 4, 40.0


class Apart(Toy):
    """Moves each factor by a norm of `STEP` a round, always in the same direction, which is the client's own."""

    def train(self, start: Any, names: Sequence[str], *more: Any, **_: Any) -> dict[str, Tensor]:
        moved = dict(start)
        for number, name in enumerate(sorted(set(names))):
            draws = torch.Generator().manual_seed(100 * self.client + number)
            way = torch.randn(start[name].shape, generator=draws)
            moved[name] = start[name] + STEP * way / way.norm()
        return moved


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", ["fedit", "fedsa_lora", "feddpa", "fedalt"])
def test_clients_that_move_apart_are_accepted(method: str, dropout: float, tmp_path: Path) -> None:
    common = {"domain": "finance", "method": {"name": method}, "lora": {"r": 2, "alpha": 0.2}}
    config = load([{**common, "federation": {"clients": CLIENTS, "rounds": 30}}]).config
    algorithm = methods.create(config)
    a = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    start = {"layer.q": LoraModule(a / a.norm(), torch.zeros(400, 2), 0.2)}
    app = clients(algorithm, start, -1, lambda reply: reply, Apart)
    grid = FaultyGrid(LocalGrid(app, CLIENTS), FaultSettings(dropout=dropout), seed=5)
    fed = Federation(config, algorithm, grid, dict.fromkeys(range(CLIENTS), 8), "run", tmp_path)
    fed.nodes.update(connect(grid, CLIENTS, 1.0))
    fed.places.update({client: node for node, client in fed.nodes.items()})
    now = Progress(algorithm.initial(start))
    for round_ in range(1, 13):
        now = complete(one_round(fed, round_, now))
        assert {x.reason for x in now.records[-1].rejected} <= {"no_reply"}, now.records[-1]
    assert sum(len(r.clients) for r in now.records) > CLIENTS * 12 * (1 - dropout) / 2


def test_a_client_of_fedalt_is_measured_by_its_own_last_update() -> None:
    """Another one that grows by 30 a round lifts nobody's bound but its own."""
    config = load([{"domain": "finance", "method": {"name": "fedalt"}, "lora": {"r": 2, "alpha": 2.0}}]).config
    algorithm = methods.create(config)
    a = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    state = algorithm.initial({"layer.q": LoraModule(a / a.norm(), torch.zeros(40, 2), 1.0)})
    for round_ in range(1, 5):
        sent = [
            {n: torch.full_like(t, norm / t.numel() ** 0.5) for n, t in to_tensors(state.adapter).items()}
            for norm in (30.0 * round_, 2.0)
        ]
        updates = [ClientUpdate(c, t, 1.0) for c, t in enumerate(sent)]
        for update in updates:
            upload = algorithm.upload(state, update.client, round_)
            for name, tensor in upload.tensors.items():
                limit = upload.growth(name) + float(tensor.norm())
                last = state.extra.get(f"fedalt/sizes/{update.client}")
                own = float(tensor.norm()) if last is None else float(last[1 + name.endswith("lora_B.weight")])
                assert limit == pytest.approx(100 + own, rel=1e-6)
        state = algorithm.server_step(updates, state, RoundContext(round_))
    assert algorithm.upload(state, 1, 5).product("layer.q") + size(state.adapter["layer.q"]) == pytest.approx(
        10_002, rel=1e-6
    )
