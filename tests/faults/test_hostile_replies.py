"""No reply of a client ends a run or moves the model further than the screening allows, whatever goes around it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune import methods
from fedtune.config import Config
from fedtune.federation import checkpoint, messages
from fedtune.federation.checkpoint import Progress
from fedtune.federation.guard import state_problem
from fedtune.federation.local import LocalGrid
from fedtune.federation.nodes import connect
from fedtune.federation.pool import complete
from fedtune.federation.rounds import Federation, one_round
from fedtune.lora.state import AdapterState, LoraModule, Plain
from fedtune.methods import METHODS
from fedtune.methods.sound import GROWTH
from fedtune.names import IA3, PREFIX
from fedtune.settings import load
from fedtune.types import ConfigError, RoundRecord
from tests.faults.hostile import Evil, Toy, clients, mutated

BAD, HONEST = 2, (0, 1, 3)
AROUND: dict[str, dict[str, Any]] = {
    "alone": {},
    "fedprox": {"drift": {"proximal_mu": 0.1}},
    "scaffold": {"drift": {"scaffold": True}, "train": {"optimizer": "sgd"}},
    "dora": {"lora": {"dora": True, "r": 2}},
    "ranks": {"lora": {"r": 2, "ranks": (1, 2, 2, 1)}},
    **{name: {"server": {"optimizer": name}} for name in ("fedavgm", "fedadagrad", "fedyogi", "fedadam")},
    # multi-krum needs five honest clients; what it sees of replies is what krum sees
    "krum": {"robust": {"rule": "krum", "malicious": 0}},
    **{rule: {"robust": {"rule": rule}} for rule in ("geometric-median", "trimmed", "dnc")},
    "foolsgold": {"robust": {"rule": "foolsgold"}},
    "clip": {"robust": {"clip_norm": 1.0}},
    "ia3": {"peft": {"kind": "ia3"}},
    # at a rate at which the clients' moves of about 0.1 are within reach of its steps
    "full": {"peft": {"kind": "full"}, "train": {"learning_rate_min": 0.1, "learning_rate_max": 0.1}},
    "ia3 under krum": {"peft": {"kind": "ia3"}, "robust": {"rule": "krum", "malicious": 0}},
    "median clip": {"robust": {"clip_norm": "median", "malicious": 0}},
}


def _config(method: str, around: Mapping[str, Any]) -> Config:
    federation = {"clients": 4, "rounds": 9, "max_skipped_rounds": 1}
    common = {"domain": "finance", "method": {"name": method}, "federation": federation}
    if "peft" not in around:
        common["lora"] = {"r": 2}
    return load([{**common, **around}]).config


@cache
def combinations() -> list[tuple[str, str]]:
    """Every method with everything that goes around it."""
    found = []
    for method, around in product(METHODS, AROUND):
        with suppress(ConfigError):  # they do not go together
            _config(method, AROUND[around])
            found.append((method, around))
    return found


def _start(*, dora: bool = False, space: str = "lora") -> AdapterState:
    generator = torch.Generator().manual_seed(1)
    if space == "ia3":
        return Plain(space, {PREFIX + "layer.k" + IA3: torch.ones(4, 1), PREFIX + "layer.down" + IA3: torch.ones(1, 3)})
    if space == "full":
        half = torch.randn(4, 3, generator=generator).bfloat16()
        return Plain(space, {"layer.weight": half, "layer.bias": torch.zeros(4), "scale": torch.ones(())})
    a = torch.randn(2, 3, generator=generator)
    return {"layer.q": LoraModule(a, torch.zeros(4, 2), 4.0, magnitude=torch.ones(4) if dora else None)}


class Scene:
    """A federation of one combination, after two honest rounds; each case is its third."""

    def __init__(self, method: str, around: str, folder: Path) -> None:
        self.config = _config(method, AROUND[around])
        algorithm, start = (
            methods.create(self.config),
            _start(dora=around == "dora", space=AROUND[around].get("peft", {}).get("kind", "lora")),
        )
        self.mutate: Any = lambda reply: reply
        app = clients(algorithm, start, BAD, lambda reply: self.mutate(reply))
        grid = LocalGrid(app, 4)
        self.fed = Federation(self.config, algorithm, grid, dict.fromkeys(range(4), 8), "run", folder)
        self.fed.nodes.update(connect(grid, 4, 1.0))
        self.fed.places.update({c: n for n, c in self.fed.nodes.items()})
        self.start = algorithm.initial(start)
        self.before = Progress(self.start)
        for round_ in (1, 2):
            self.before = complete(one_round(self.fed, round_, self.before))
        assert [r.status for r in self.before.records] == ["ok", "ok"], self.before.records[-1]
        assert all(len(r.clients) == 4 for r in self.before.records)

    def case(self, seed: int) -> Progress:
        draw = random.Random(seed)
        self.mutate = lambda reply: mutated(draw, reply)
        before = Progress(self.before.state, list(self.before.records))
        return complete(one_round(self.fed, 3, before))

    def go_on(self, progress: Progress) -> RoundRecord:
        self.mutate = lambda reply: reply
        return complete(one_round(self.fed, 4, progress)).records[-1]


def _largest(progress: Progress) -> float:
    from fedtune.lora.state import to_tensors

    return max(float(t.norm()) for t in to_tensors(progress.state.adapter).values())


def _check(scene: Scene, seed: int, label: str) -> None:
    done = scene.case(seed)
    record = done.records[-1]
    where = f"{label}, case {seed}: {record.rejected} {record.notes}"
    used = {c.client for c in record.clients}
    assert record.status == "ok", where
    assert used >= set(HONEST), where
    assert (BAD in used) != (BAD in {r.client for r in record.rejected}), where
    assert not state_problem(done.state), where
    # a mean of four, of which one is allowed GROWTH more; products of two such factors
    assert _largest(done) <= GROWTH**2, where
    assert len(json.dumps(record.as_json(), allow_nan=False).encode()) < 20_000, where
    # whatever was accepted is a state from which all that are honest are accepted
    after = scene.go_on(Progress(done.state, list(done.records)))
    assert (after.status, [c.client for c in after.clients]) == ("ok", [0, 1, 2, 3]), (where, after)
    if seed % 20 == 0:
        kept = Progress(done.state, done.records, 0)
        checkpoint.save(scene.fed.folder, kept, "run", 1)


def _cases(total: int, offset: int) -> Iterator[tuple[tuple[str, str], list[int]]]:
    """Deal cases out to the combinations."""
    every = combinations()
    share = -(-total // len(every))
    for number, combination in enumerate(every):
        first = offset + number * share
        yield combination, list(range(first, first + share))


def _all(total: int, offset: int, folder: Path) -> int:
    count = 0
    for (method, around), seeds in _cases(total, offset):
        scene = Scene(method, around, folder / method / around)
        for seed in seeds:
            _check(scene, seed, f"{method} with {around}")
            count += 1
    assert Evil.unpickled == 0
    return count


def test_every_method_is_there_with_most_of_what_goes_around_it() -> None:
    every = combinations()
    assert {m for m, _ in every} == set(METHODS)
    assert {a for _, a in every} == set(AROUND)


def test_no_reply_ends_a_run(tmp_path: Path) -> None:
    assert _all(500, 0, tmp_path) >= 500


@pytest.mark.parametrize("around", ["ia3", "full", "ia3 under krum"])
def test_no_reply_ends_a_run_that_trains_no_factors(tmp_path: Path, around: str) -> None:
    scene = Scene("fedit", around, tmp_path)
    for seed in range(1000, 1060):
        _check(scene, seed, f"fedit with {around}")
    assert Evil.unpickled == 0


def _longest(reply: Any, names: str, size: float) -> Any:
    """Return a reply whose tensors of some names are as long as a size says, and whose others are 0."""
    sent = messages.unpack(reply.content.array_records[messages.ADAPTER])
    for name, tensor in sent.items():
        if tensor.is_floating_point() and "magnitude" not in name:
            share = size if names in name else 0.0
            if name.startswith("fedkseed/"):  # slopes belong to the client's own directions
                sent[name] = (tensor != 0).to(tensor.dtype)
            else:
                sent[name] = torch.zeros_like(tensor)
                sent[name].view(-1)[:: max(1, tensor.shape[-1] if tensor.dim() else 1)] = 1.0
            sent[name] *= share / max(1.0, float(sent[name].norm()))
        elif names in name:  # nearly as far as a magnitude may go
            sent[name] = tensor * (1.8 if size else 0.55)
    reply.content[messages.ADAPTER] = messages.pack(sent, in_process=True)
    return reply


NAMES = ("lora_A", "lora_B", "magnitude", "scaffold", "")


@pytest.mark.parametrize("size", [0.99 * GROWTH, 9.0, 0.0])
def test_who_starts_from_an_accepted_state_is_accepted(tmp_path: Path, size: float) -> None:
    """A client sends the largest that is accepted, another part in each of several rounds; then all are honest."""
    for number, (method, around) in enumerate(combinations()):
        scene = Scene(method, around, tmp_path / method / around)
        now = scene.before
        for round_ in range(3, 9):
            names = NAMES[(number + round_) % len(NAMES)]
            scene.mutate = (lambda reply, names=names: _longest(reply, names, size)) if round_ < 6 else lambda r: r
            now = complete(one_round(scene.fed, round_, now))
            record = now.records[-1]
            used = {c.client for c in record.clients}
            assert record.status == "ok", (method, around, record)
            assert used >= set(HONEST if round_ < 6 else range(4)), (method, around, names, record)


@pytest.mark.parametrize(("size", "refused"), [(9.9, []), (30.0, ["too_large"]), (9.9e3, ["too_large"])])
def test_a_control_is_no_larger_than_clipped_gradients_make_it(tmp_path: Path, size: float, refused: list[str]) -> None:
    scene = Scene("fedit", "scaffold", tmp_path)
    scene.mutate = lambda reply: _longest(reply, "scaffold", size)
    record = complete(one_round(scene.fed, 3, scene.before)).records[-1]
    assert [r.reason for r in record.rejected] == refused


@pytest.mark.parametrize(
    ("method", "around", "names"), [("fedit", "scaffold", "scaffold/base"), ("fedkseed", "alone", "fedkseed/")]
)
def test_the_bound_of_what_is_added_up_does_not_grow_with_the_sum(
    tmp_path: Path, method: str, around: str, names: str
) -> None:
    """One client sends the largest change that is accepted in every round."""
    scene = Scene(method, around, tmp_path)
    algorithm, now = scene.fed.algorithm, scene.before

    def limit(round_: int) -> float:
        sent = algorithm.upload(now.state, BAD, round_)
        return max(sent.growth(n) + float(t.norm()) for n, t in sent.tensors.items() if n.startswith(names))

    first = limit(3)
    for round_ in range(3, 9):
        scene.mutate = lambda reply, size=0.999 * limit(round_): _longest(reply, names, size)
        now = complete(one_round(scene.fed, round_, now))
        assert BAD in {c.client for c in now.records[-1].clients}, now.records[-1].rejected
    assert limit(9) == first
    sums = {n: float(t.norm()) for n, t in now.state.carried().items() if n.startswith(names)}
    assert sums
    if around == "scaffold":  # a mean of means of gradients, each clipped to this norm
        assert max(sums.values()) <= scene.config.train.max_grad_norm * (1 + 1e-6)


def test_a_slope_along_a_direction_of_no_step_is_refused(tmp_path: Path) -> None:
    """One along each of them, however small, would make every later replay as long as there are directions."""
    scene = Scene("fedkseed", "alone", tmp_path)
    (name,) = scene.fed.algorithm.upload(scene.before.state, BAD, 3).tensors

    def everywhere(reply: Any) -> Any:
        sent = messages.unpack(reply.content.array_records[messages.ADAPTER])
        reply.content[messages.ADAPTER] = messages.pack(
            {n: t + 1e-30 * (t == 0) for n, t in sent.items()}, in_process=True
        )
        return reply

    taken = int(scene.before.state.extra[name].count_nonzero())
    scene.mutate = everywhere
    after = complete(one_round(scene.fed, 3, scene.before))
    assert [(r.client, r.reason) for r in after.records[-1].rejected] == [(BAD, "values")]
    assert int(after.state.extra[name].count_nonzero()) <= taken + 3 * Toy.steps


@pytest.mark.slow
def test_none_of_five_thousand_replies_ends_a_run(tmp_path: Path) -> None:
    assert _all(5000, 10_000, tmp_path) >= 5000
