"""DoRA's magnitudes under attack: honest clients that really train stay in, and the model stays theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune import methods
from fedtune.federation import messages
from fedtune.federation.checkpoint import Progress
from fedtune.federation.local import LocalGrid
from fedtune.federation.nodes import connect
from fedtune.federation.pool import complete
from fedtune.federation.rounds import Federation, one_round
from fedtune.lora import dora
from fedtune.lora.state import PREFIX, A, AdapterState, B, LoraModule, M
from fedtune.methods import METHODS
from fedtune.methods.traits import magnitudes
from fedtune.settings import load
from tests.faults.hostile import Toy, clients

PATH, BAD, ROUNDS = "layer.q", 2, 15
DORA = [name for name in METHODS if magnitudes(METHODS[name])]
_draws = torch.Generator().manual_seed(0)
BASE = torch.randn(4, 6, generator=_draws)
TARGET = BASE * torch.tensor([[0.7], [1.0], [1.3], [1.6]]) + 0.3 * torch.randn(4, 6, generator=_draws)


def weight(m: Tensor, a: Tensor, b: Tensor) -> Tensor:
    moved = BASE + 2.0 * (b @ a)
    return m[:, None] * moved / moved.norm(dim=1, keepdim=True)


def start() -> AdapterState:
    a = 0.3 * torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    return {PATH: LoraModule(a, torch.zeros(4, 2), 4.0, magnitude=BASE.norm(dim=1))}


class Regression(Toy):
    """A client that trains a DoRA layer to be `TARGET`, by AdamW."""

    learning_rate, work, sign = 0.01, 10, 1.0

    def train(self, start: Any, names: Sequence[str], *_: Any, **__: Any) -> dict[str, Tensor]:
        now = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
        stepper = torch.optim.AdamW([now[n] for n in names], lr=self.learning_rate, weight_decay=0.0)
        for _ in range(self.work):
            stepper.zero_grad()
            made = weight(*(now[PREFIX + PATH + end] for end in (M, A, B)))
            (made - self.sign * TARGET).square().sum().backward()  # type: ignore[no-untyped-call]
            stepper.step()
        return {n: t.detach() for n, t in now.items()}

    def row_norms(self, at: Any) -> dict[str, Tensor]:
        return {PATH: dora.row_norms(BASE, 2.0 * (at[PREFIX + PATH + B] @ at[PREFIX + PATH + A]))}


class Race:
    """A federation of four that trains `TARGET`; client `BAD` may send the smallest or the largest magnitudes."""

    def __init__(
        self, name: str, folder: Path, rate: float, attack: str = "", work: int = 10, sign: float = 1.0, **around: Any
    ):
        federation = {"clients": 4, "rounds": 100, "max_skipped_rounds": 1}
        tree = {"domain": "finance", "method": {"name": name}, "lora": {"r": 2, "alpha": 4.0, "dora": True}}
        self.config = load([{**tree, "federation": federation, **around}]).config
        self.algorithm = methods.create(self.config)
        self.attack = attack
        kind = type("Client", (Regression,), {"learning_rate": rate, "work": work, "sign": sign})
        app = clients(self.algorithm, start(), BAD, self._mutate, kind)
        grid = LocalGrid(app, 4)
        self.fed = Federation(self.config, self.algorithm, grid, dict.fromkeys(range(4), 8), "run", folder)
        self.fed.nodes.update(connect(grid, 4, 1.0))
        self.fed.places.update({c: n for n, c in self.fed.nodes.items()})
        self.now = Progress(self.algorithm.initial(start()))

    def _mutate(self, reply: Any) -> Any:
        magnitude = self.now.state.adapter[PATH].magnitude
        if not self.attack or magnitude is None:
            return reply
        sent = messages.unpack(reply.content.array_records[messages.ADAPTER])
        sent[PREFIX + PATH + M] = dora.interval(magnitude)[self.attack == "largest"]
        reply.content[messages.ADAPTER] = messages.pack(sent, in_process=True)
        return reply

    def run(self, rounds: int) -> Race:
        done = len(self.now.records)
        for round_ in range(done + 1, done + rounds + 1):
            self.now = complete(one_round(self.fed, round_, self.now))
        return self

    @property
    def refused(self) -> list[tuple[int, int, str]]:
        return [(r.round, x.client, x.detail) for r in self.now.records for x in r.rejected]

    @property
    def distance(self) -> float:
        """The global model's distance from the target, as a part of the base model's."""
        module = self.now.state.adapter[PATH]
        assert module.magnitude is not None
        relative = magnitudes(type(self.algorithm.method)) == "exact"
        norms = dora.row_norms(BASE, module.delta())
        m = module.magnitude * norms if relative else module.magnitude
        return float((weight(m, module.a, module.b) - TARGET).norm() / (BASE - TARGET).norm())


@pytest.mark.parametrize("name", DORA)
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_honest_clients_are_accepted_at_a_large_learning_rate(name: str, rate: float, tmp_path: Path) -> None:
    """They learn the opposite of the base model's weights, which takes magnitudes below 0 in a round or in several."""
    race = Race(name, tmp_path, rate, sign=-1.0).run(ROUNDS)
    assert race.refused == []
    assert all(len(record.clients) == 4 for record in race.now.records)


@pytest.mark.parametrize("name", DORA)
def test_one_of_four_neither_drives_the_others_out_nor_takes_the_model(name: str, tmp_path: Path) -> None:
    """It sends the smallest magnitudes that are accepted, in every round."""
    race = Race(name, tmp_path, 0.05, "smallest").run(ROUNDS)
    assert race.refused == []
    assert all(len(record.clients) == 4 for record in race.now.records)
    assert race.distance < 1.0, "worse than the base model"
    race.attack = ""
    assert race.run(2 * ROUNDS).distance < 0.5, "the others cannot make up for it"


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "flexlora"])
@pytest.mark.parametrize("attack", ["smallest", "largest"])
def test_no_number_of_rounds_drives_honest_clients_out(name: str, attack: str, tmp_path: Path) -> None:
    race = Race(name, tmp_path, 1e-4, attack, work=1).run(40)
    assert race.refused == []
    magnitude = race.now.state.adapter[PATH].magnitude
    assert magnitude is not None
    assert dora.SMALLEST * 0.999 <= float(magnitude.min()) <= float(magnitude.max()) <= dora.LARGEST * 1.001


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "flexlora"])
@pytest.mark.parametrize("kind", ["boost", "sign-flip", "random"])
def test_a_scripted_attacker_is_accepted_with_magnitudes(name: str, kind: str, tmp_path: Path) -> None:
    """One that is refused would show nothing of what a method resists."""
    around: dict[str, Any] = {"attack": {"kind": kind, "clients": [BAD], "scale": 4.0}}
    assert Race(name, tmp_path, 0.05, **around).run(3).refused == []


def test_a_server_optimiser_moves_a_magnitude_no_further_than_a_client_may(tmp_path: Path) -> None:
    around: dict[str, Any] = {"server": {"optimizer": "fedadam", "learning_rate": 5.0}}
    race = Race("fedit", tmp_path, 0.05, **around)
    was = start()[PATH].magnitude
    for _ in range(4):
        now = race.run(1).now.state.adapter[PATH].magnitude
        assert was is not None
        assert now is not None
        assert bool((now >= was / 2).all())
        assert bool((now <= was * 2).all())
        was = now
    assert race.refused == []
