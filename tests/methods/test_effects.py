"""Every setting of a run's training and of what is around a method changes some number, or is refused by name."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.config.load import merge
from fedtune.lora.base_delta import effective
from fedtune.lora.state import AdapterState, LoraModule
from fedtune.methods import METHODS, Algorithm, ClientUpdate, RoundContext, ServerState, create, problems
from fedtune.methods.requests import Train
from fedtune.methods.traits import by_product, magnitudes, moves_base, sends_pairs
from fedtune.methods.wrappers import rules
from fedtune.training import schedule
from fedtune.training.executor import make_step, optimizer
from fedtune.types import RunFailedError, UpdateError, derive_seed
from tests.clients import begun_by, fit_by

CLIENTS, ROUNDS = 5, 3
BASE: dict[str, Any] = {
    "domain": "finance",
    "federation": {"clients": CLIENTS, "rounds": ROUNDS},
    "lora": {"r": 4, "alpha": 8.0},
    "train": {"max_steps": 2},
}
# what a round's rows and tokens are, and which layers there are, is not a matter of methods
ELSEWHERE = {
    *("train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.max_length", "train.labels"),
    *("train.train_eos", "train.rows", "lora.target_modules", "lora.r", "lora.ranks"),
}
TRAIN: dict[str, Any] = {
    "train.optimizer": "sgd",
    "train.learning_rate_max": 0.2,
    "train.learning_rate_min": 5e-4,
    "train.max_steps": 3,
    "train.max_grad_norm": 1e-2,
    "train.weight_decay": 0.3,
    "train.adam_beta1": 0.5,
    "train.adam_beta2": 0.5,
    "train.adam_epsilon": 0.1,
    "drift.proximal_mu": 0.5,
    "lora.dropout": 0.3,
    "lora.alpha": 16.0,
    "lora.rslora": True,
    "lora.dora": True,
}
OWN: dict[str, Any] = {
    **{"base_rank": 1, "residual_rank": 1, "blend": 0.5, "ridge": 5.0, "tau": 0.5, "width": 1, "rest": "drop"},
    **{"share": 0.25, "repair": 0.1, "regulariser": 5.0, "gamma": 0.5, "samples": 2, "local_weight": 0.9},
    **{"seeds": 8, "epsilon": 0.3, "learning_rate": 0.01, "steps": 1},
}


def nested(key: str, value: Any) -> dict[str, Any]:
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(tree)


class Toy:
    """A client whose loss is a sum of squares of all tensors' distances to its own, trained by the real optimisers."""

    tokens = 0

    def __init__(self, config: Config, client: int, round_: int, phase: int, kept: dict[str, Tensor]) -> None:
        self._config = config
        self.client, self.round, self.phase, self.kept = client, round_, phase, kept
        self.layout = create(config).method.cut(layout(config), client)
        self.rate = schedule.learning_rate(config.train, round_, config.federation.rounds)
        self.steps = config.train.max_steps

    def _wish(self, name: str, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.client, name))
        flipped = -1 if self._config.attack.kind == "label-flip" and self.client in self._config.attack.clients else 1
        return flipped * torch.randn(like.shape, generator=generator, dtype=like.dtype)

    def _loss(self, now: Mapping[str, Tensor], *, dropped: bool) -> Tensor:
        keep = 1 - self._config.lora.dropout if dropped else 1.0
        parts = [(keep * t - self._wish(n, t)).square().sum() for n, t in now.items() if t.dim() == 2]
        return 0.5 * sum(parts[1:], parts[0])

    def train(self, start: Any, names: Any, term: Any = None, masks: Any = None, correction: Any = None) -> Any:
        chosen = {n: torch.nn.Parameter(start[n].clone()) for n in names}
        made = optimizer([(list(chosen.values()), self.rate)], self._config.train)
        for _ in range(self.steps):
            made.zero_grad(set_to_none=True)
            self._loss(chosen, dropped=True).backward()  # type: ignore[no-untyped-call]
            asked = Train(start, names, term, masks, correction)
            make_step(asked, chosen, list(chosen.values()), self._config.train.max_grad_norm, made)
        return {**start, **{n: p.detach() for n, p in chosen.items()}}

    def gradients(self, at: Any, names: Any) -> dict[str, Tensor]:
        return {n: at[n] - self._wish(n, at[n]) for n in names}

    def losses(self, step: int, points: Any) -> list[float]:
        return [float(self._loss(p, dropped=False)) for p in points]

    def features(self, count: int) -> Tensor:
        return torch.ones(count, 4)

    def row_norms(self, at: Any) -> dict[str, Tensor]:
        return {"l.q": torch.linspace(1, 2, 6)}


def layout(config: Config) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    lora = config.lora
    a, b = torch.randn(lora.r, 7, generator=generator), torch.randn(6, lora.r, generator=generator)
    return {"l.q": LoraModule(a, b, lora.alpha, lora.rslora, torch.linspace(1, 2, 6) if lora.dora else None)}


def _stepped(made: Algorithm, sent: list[ClientUpdate], state: ServerState, round_: int) -> ServerState:
    """Make a step as the loop does: an attacker that is named by an error is left out."""
    try:
        return made.server_step(sent, state, RoundContext(round_))
    except UpdateError as err:
        return made.server_step([u for u in sent if u.client != err.client], state, RoundContext(round_))
    except RunFailedError:
        return replace(state, round=round_)


@cache
def _outcome(text: str) -> list[Tensor]:
    config = Config.model_validate_json(text)
    made = create(config)
    state: ServerState = made.initial(layout(config))
    kept: dict[int, dict[str, Tensor]] = {c: {} for c in range(CLIENTS)}
    sent: list[ClientUpdate] = []
    for round_ in range(1, ROUNDS + 1):
        phase = 0
        while state.round < round_:
            sent, phase = [], phase + 1
            for client in range(CLIENTS):
                fitted = fit_by(made, Toy(config, client, round_, phase, kept[client]), made.view(state, client))
                kept[client] = fitted.kept or kept[client]
                sent.append(ClientUpdate(client, fitted.payload, 10.0 + client))
            state = _stepped(made, sent, state, round_)
    begun = begun_by(made, made.method.cut(layout(config), 0), made.view(state, 0), kept[0], ROUNDS + 1)
    whole = [p.dense() for p in effective(state.adapter, state.base).values()]
    return [*whole, *begun.values(), *kept[0].values(), *(t for u in sent for t in u.tensors.values())]


def outcome(config: Config) -> list[Tensor]:
    return _outcome(config.model_dump_json())


def has_effect(name: str, key: str, value: Any, around: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a setting changes a number; if not, it must have been refused by its name."""
    rates = {"train": {"learning_rate_max": 0.1, "learning_rate_min": 0.01}} if name != "fedkseed" else {}
    tree = merge(merge(merge(BASE, rates), {"method": {"name": name}}), around or {})
    before, after = Config.model_validate(tree), Config.model_validate(merge(tree, nested(key, value)))
    assert not list(problems(before)), [str(p) for p in problems(before)]
    refused = list(problems(after))
    if refused:
        assert any(p.where.startswith((key, key.split(".")[0])) for p in refused), [str(p) for p in refused]
        return False
    one, two = outcome(before), outcome(after)
    moved = len(one) != len(two) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, two, strict=True)
    )
    assert moved, f"{key} = {value!r} is accepted with {name} and changes nothing"
    return True


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_training_has_an_effect_or_is_refused(name: str) -> None:
    found = {key: has_effect(name, key, value) for key, value in TRAIN.items() if key != "lora.dora"}
    assert all(found.values()) is (name != "fedkseed")
    assert has_effect(name, "lora.dora", True) is bool(magnitudes(METHODS[name]))
    if name != "fedkseed":
        sgd = {"train": {"optimizer": "sgd"}}
        assert not any(has_effect(name, f"train.adam_{key}", 0.5, sgd) for key in ("beta1", "beta2", "epsilon"))
        assert not has_effect(name, "drift.proximal_mu", 0.5, {"train": {"max_steps": 1}})
        has_effect(name, "drift.scaffold", True, sgd)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_methods_own_has_an_effect(name: str) -> None:
    for key in METHODS[name].Parameters.model_fields:
        assert has_effect(name, f"method.{key}", OWN[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_every_attack_and_its_scale_have_an_effect_or_are_refused(name: str) -> None:
    for kind in ("sign-flip", "boost", "random", "gauge", "label-flip"):
        around = {"attack": {"kind": "random" if kind != "random" else "boost", "clients": [1]}}
        changed = has_effect(name, "attack.kind", kind, around)
        assert changed is (kind != "gauge" or sends_pairs(METHODS[name]))
        if changed:
            around["attack"]["kind"] = kind
            assert has_effect(name, "attack.scale", 3.0, around) is (kind != "label-flip")
            assert has_effect(name, "attack.scale", 1.0, around) is (kind in ("sign-flip", "random"))
    assert not has_effect(name, "attack.scale", 3.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_server_optimiser_has_an_effect_or_is_refused(name: str) -> None:
    for chosen in ("fedavgm", "fedadagrad", "fedyogi", "fedadam"):
        assert has_effect(name, "server.optimizer", chosen) is METHODS[name].steady
    assert not has_effect(name, "server.beta1", 0.5)


NUMBERS = {"convention": "flower", "learning_rate": 0.5, "beta1": 0.3, "beta2": 0.3, "tau": 0.3}
UNUSED = {("fedavgm", "beta2"), ("fedavgm", "tau"), ("fedadagrad", "beta2")}


@pytest.mark.parametrize("chosen", ["fedavgm", "fedadagrad", "fedyogi", "fedadam"])
@pytest.mark.parametrize("key", list(NUMBERS))
def test_every_number_of_a_server_optimiser_has_an_effect_or_is_refused(chosen: str, key: str) -> None:
    around = {"server": {"optimizer": chosen}}
    assert has_effect("ffa_lora", f"server.{key}", NUMBERS[key], around) is ((chosen, key) not in UNUSED)


@pytest.mark.parametrize("name", METHODS)
def test_every_rule_has_an_effect_or_is_refused(name: str) -> None:
    for rule in ("krum", "multi-krum", "geometric-median", "trimmed", "foolsgold", "dnc"):
        assert has_effect(name, "robust.rule", rule) is by_product(METHODS[name])
    for clip in ("median", 1e-3):
        assert has_effect(name, "robust.clip_norm", clip) is by_product(METHODS[name])


@pytest.mark.parametrize("rule", ["none", "krum", "multi-krum", "geometric-median", "trimmed", "foolsgold", "dnc"])
def test_every_number_of_a_rule_has_an_effect_or_is_refused(rule: str) -> None:
    around = {"robust": {"rule": rule}}
    assert has_effect("flexlora", "robust.iterations", 1, around) is (rule in ("geometric-median", "trimmed"))
    if rule in ("multi-krum", "trimmed", "dnc"):
        assert not has_effect("flexlora", "robust.malicious", 0, around)  # nobody would be dropped
    if rule in ("trimmed", "dnc"):
        assert has_effect("flexlora", "robust.malicious", 2, around)
    if rule in ("krum", "geometric-median"):  # the count also says how many updates a round needs
        tree = merge(merge(BASE, {"method": {"name": "flexlora"}}), merge(around, {"robust": {"malicious": 0}}))
        assert rules.fewest(Config.model_validate(tree).robust) < 5
    if rule in ("none", "foolsgold"):
        assert not has_effect("flexlora", "robust.malicious", 0, around)
    if rule != "none":
        assert not has_effect("flexlora", "federation.weights", "shard-size", around)


@pytest.mark.parametrize(
    ("key", "value"), [("rule", "foolsgold"), ("rule", "geometric-median"), ("clip_norm", "median")]
)
def test_nothing_compares_one_client_with_itself(key: str, value: str) -> None:
    tree = merge(BASE, {"method": {"name": "flexlora"}, "federation": {"clients": 1}})
    said = list(problems(Config.model_validate(merge(tree, {"robust": {key: value, "malicious": 0}}))))
    assert any(p.where == f"robust.{key} = {value!r}" and "one client is asked" in p.what for p in said), said


def test_one_round_has_the_smallest_rate_only() -> None:
    tree = merge(BASE, {"federation": {"rounds": 1}, "train": {"learning_rate_max": 0.5}})
    said = [str(p) for p in problems(Config.model_validate(tree))]
    assert len(said) == 1
    assert "train.learning_rate_max = 0.5: has no effect: the rate falls to learning_rate_min" in said[0]


def test_a_client_sends_both_factors_where_a_method_says_so() -> None:
    for name, kind in METHODS.items():
        config = Config.model_validate(merge(BASE, {"method": {"name": name}}))
        sent = create(config).upload(create(config).initial(layout(config)), 0, 1).tensors
        assert sends_pairs(kind) is all(any(n.endswith(f".lora_{f}.weight") for n in sent) for f in "AB"), name


@pytest.mark.parametrize(
    ("name", "key", "value", "around"),
    [
        ("lora_a2", "method.share", 0.25, {"lora": {"ranks": [1, 2, 3, 4, 4]}}),
        ("hetlora", "method.gamma", 0.5, {"lora": {"r": 1}}),
        ("fedex_lora", "method.residual_rank", 16, {}),
        ("fedask", "method.width", 20, {}),
        ("fedask", "method.width", 10**9, {}),
        *((name, "method.base_rank", 10**9, {}) for name in METHODS if moves_base(METHODS[name])),
        *((name, "lora.ranks", [4] * 5, {}) for name in METHODS if METHODS[name].mixed_ranks and name != "lora_a2"),
        ("flexlora", "lora.ranks", {4: 1.0}, {}),
        ("hetlora", "lora.ranks", {2: 0.01, 4: 0.99}, {}),
    ],
)
def test_a_methods_own_setting_that_another_one_overrules_is_refused(
    name: str, key: str, value: Any, around: dict[str, Any]
) -> None:
    assert not has_effect(name, key, value, around)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fedask", "method.width", 3),
        ("flora", "method.base_rank", 5),
        ("lora_a2", "lora.ranks", [4] * 5),
        *((name, "lora.ranks", [2, 4, 4, 4, 4]) for name in METHODS if METHODS[name].mixed_ranks),
    ],
)
def test_what_is_below_the_limit_has_an_effect(name: str, key: str, value: Any) -> None:
    assert has_effect(name, key, value)


def test_what_a_protocol_says_is_taken_by_every_method() -> None:
    """Only what somebody changed is refused: a leaderboard's rates are no reason against a method without any."""
    for protocol in ("quickstart", "corrected", "flowertune-leaderboard"):
        from fedtune.config import read_protocol
        from fedtune.config.load import standard

        usual = standard("finance", read_protocol(protocol))
        for name in METHODS:
            config = usual.model_copy(update={"method": usual.method.model_copy(update={"name": name})})
            assert not list(problems(config)), (name, [str(p) for p in problems(config)])


def test_every_setting_is_in_one_of_the_tables() -> None:
    """A new one has to be given an effect, a refusal, or a place where it acts."""
    known = Config(domain="finance")
    listed = {*TRAIN, *ELSEWHERE, "drift.scaffold", "server.optimizer", *(f"server.{k}" for k in NUMBERS)}
    listed |= {f"robust.{k}" for k in ("rule", "malicious", "clip_norm", "iterations")}
    listed |= {f"attack.{k}" for k in ("kind", "clients", "scale")}
    for section in ("train", "drift", "server", "robust", "attack", "lora"):
        assert {f"{section}.{k}" for k in type(getattr(known, section)).model_fields} <= listed
