"""What goes around a method: server optimisers against Flower's own, SCAFFOLD on quadratics, robust rules, attackers."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import Config
from fedtune.config.schema import AttackSettings, RobustSettings, ServerSettings
from fedtune.lora.state import to_tensors
from fedtune.methods import METHODS, Algorithm, ClientUpdate, RoundContext, ServerState, build, client_ranks, create
from fedtune.methods.requests import Train
from fedtune.methods.wrappers import attack, rules, scaffold
from fedtune.methods.wrappers import server_optimizer as optimizer
from fedtune.methods.wrappers.fedprox import proximal
from tests.clients import fit_by, ran_by
from tests.methods.test_methods import START, adapter, dense, mean, same
from tests.training.programs import asking

OPTIMIZERS = ["fedavgm", "fedadagrad", "fedyogi", "fedadam"]


def algorithm(**changes: Any) -> Algorithm:
    return create(Config.model_validate({"domain": "finance", **changes}))


def updates(*seeds: int) -> list[ClientUpdate]:
    return [ClientUpdate(i, to_tensors(adapter(s)), 1.0) for i, s in enumerate(seeds)]


def _always(name: str) -> bool:
    return True


def _walk(chosen: ServerSettings, changes: list[Tensor]) -> Tensor:
    """Apply an optimiser to a number of mean changes, each relative to where the last step ended."""
    now: dict[str, Tensor] = {"x": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}
    memory: dict[str, Tensor] = {}
    for round_, change in enumerate(changes, 1):
        now, memory = optimizer.step(chosen, now, {"x": now["x"] + change}, memory, round_, _always)
    return now["x"]


CHANGES = [torch.tensor(c, dtype=torch.float64) for c in ([0.1, 0.0, -0.3], [-0.2, 0.4, 0.1], [0.05, 0.1, 0.2])]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flowers_convention_is_what_flower_computes(name: str) -> None:
    """Flower's own strategies on the same changes, over three rounds."""
    from flwr.app import Array, ArrayRecord, ConfigRecord
    from flwr.serverapp import strategy

    kind = {"fedavgm": "FedAvgM", "fedadagrad": "FedAdagrad", "fedyogi": "FedYogi", "fedadam": "FedAdam"}[name]
    extra = {"server_momentum": 0.9} if name == "fedavgm" else {}
    theirs: Any = getattr(strategy, kind)(**extra)
    now = np.array([1.0, -2.0, 0.5])
    for round_, change in enumerate(CHANGES, 1):
        start, mean_ = ArrayRecord({"x": Array(now)}), ArrayRecord({"x": Array(now + change.numpy())})
        theirs.current_arrays = {"x": now} if name != "fedavgm" else start
        base = strategy.FedAvg.aggregate_train
        try:
            strategy.FedAvg.aggregate_train = lambda *_, m=mean_: (m, None)  # type: ignore[method-assign]
            got, _ = theirs.aggregate_train(round_, [])
        finally:
            strategy.FedAvg.aggregate_train = base  # type: ignore[method-assign]
        now = got["x"].numpy()
    assert ConfigRecord  # the same import path as real runs
    ours = _walk(ServerSettings(optimizer=name, convention="flower"), CHANGES)
    assert np.allclose(ours.numpy(), now, atol=1e-12)


def test_momentum_of_nothing_at_rate_one_is_the_mean() -> None:
    for convention in ("openfedllm", "flower"):
        plain = ServerSettings(optimizer="fedavgm", convention=convention, beta1=0.0)
        assert torch.allclose(_walk(plain, CHANGES), torch.tensor([1.0, -2.0, 0.5]).double() + sum(CHANGES))


def test_openfedllms_moving_average_starts_with_the_first_change() -> None:
    first, second = CHANGES[:2]
    got = _walk(ServerSettings(optimizer="fedavgm"), [first, second])
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert torch.allclose(got, start + first + 0.9 * first + 0.1 * second)


def test_adam_without_memory_is_a_sign_like_step() -> None:
    chosen = ServerSettings(optimizer="fedadam", learning_rate=0.3, beta1=0.0, beta2=0.0, tau=0.01)
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert torch.allclose(_walk(chosen, CHANGES[:1]), start + 0.3 * CHANGES[0] / (CHANGES[0].abs() + 0.01))
    slow = ServerSettings(optimizer="fedadam", learning_rate=1e9, beta1=0.0, beta2=0.0, tau=1e9)
    assert torch.allclose(_walk(slow, CHANGES[:1]), start + CHANGES[0])


def test_yogi_is_adam_at_the_first_step_from_zero_and_adagrads_sum_never_falls() -> None:
    steps = [
        _walk(ServerSettings(optimizer=n, convention="flower", learning_rate=0.1, beta1=0.0, beta2=0.9), CHANGES[:1])
        for n in ("fedyogi", "fedadam")
    ]
    bias = (1 - 0.9**2) ** 0.5  # Flower's FedAdam corrects its step with the exponent round + 1
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert torch.allclose((steps[0] - start) * bias, steps[1] - start)
    memory: dict[str, Tensor] = {}
    sums = []
    for change in CHANGES:
        _, memory = optimizer.step(
            ServerSettings(optimizer="fedadagrad"), {"x": start}, {"x": start + change}, memory, 1, _always
        )
        sums.append(memory["v/x"])
    assert all(bool((b >= a).all()) for a, b in itertools.pairwise(sums))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_never_moves_a_frozen_factor(name: str) -> None:
    alternating = algorithm(method={"name": "rolora"}, server={"optimizer": name})
    state = alternating.initial(START)
    for round_ in (1, 2, 3):
        before = to_tensors(state.adapter)
        sent = [
            ClientUpdate(u.client, {n: t for n, t in u.tensors.items() if alternating.method.trainable(round_, n)}, 1.0)
            for u in updates(round_, round_ + 5)
        ]
        state = alternating.server_step(sent, state, RoundContext(round_))
        after = to_tensors(state.adapter)
        for tensor_name in before:
            frozen = not alternating.method.trainable(round_, tensor_name)
            assert torch.equal(after[tensor_name], before[tensor_name]) is frozen


# what `Quadratic` does: it clips nothing
PLAIN_SGD = {"optimizer": "sgd", "max_grad_norm": 1e6}


class Quadratic:
    """A client whose loss is h/2 ||x - target||^2, trained with plain gradient steps as a model would be."""

    round, phase, rate, steps = 1, 1, 0.1, 5

    def __init__(self, client: int, kept: dict[str, Tensor]) -> None:
        self.client, self.kept = client, kept
        self.layout = START
        self.pull, self.target = (1.0, 4.0) if client else (3.0, -1.0)

    def train(self, start: Any, names: Any, term: Any = None, masks: Any = None, correction: Any = None) -> Any:
        now = {n: t.clone() for n, t in start.items()}
        for _ in range(self.steps):
            for name in names:
                gradient = self.pull * (now[name] - self.target)
                if correction is not None:
                    correction.count(name, gradient)
                now[name] -= self.rate * (gradient + (correction or {}).get(name, 0.0))
        return now


def _drifting(scaffold: bool, rounds: int = 200, lost: frozenset[int] = frozenset()) -> float:
    """Return how far two clients with different curvatures end from the joint optimum.

    In the rounds `lost`, the answer of client 1 never arrives.
    """
    made = algorithm(drift={"scaffold": scaffold}, train=PLAIN_SGD, federation={"clients": 2})
    state, kept = made.initial(START), {0: dict[str, Tensor](), 1: dict[str, Tensor]()}
    for round_ in range(1, rounds + 1):
        sent = []
        for client in (0, 1):
            local = Quadratic(client, kept[client])
            local.round = round_
            fitted = fit_by(made, local, made.view(state, client))
            kept[client] = fitted.kept
            if client == 0 or round_ not in lost:
                sent.append(ClientUpdate(client, fitted.payload, 1.0))
        state = made.server_step(sent, state, RoundContext(round_))
    best = (3.0 * -1.0 + 1.0 * 4.0) / 4.0
    return max(float((t - best).abs().max()) for t in to_tensors(state.adapter).values())


def test_scaffold_removes_the_drift_that_averaging_keeps() -> None:
    assert _drifting(False) > 0.05
    assert _drifting(True) < 1e-6


def test_scaffold_survives_answers_that_never_arrive() -> None:
    """A control that moved while the server's did not would bias every round that follows."""
    assert _drifting(True, lost=frozenset({1, 4, 5, 6, 9})) < 1e-6


def test_scaffolds_first_round_is_averaging_and_full_participation_means_the_mean_control() -> None:
    made = algorithm(drift={"scaffold": True}, train=PLAIN_SGD, federation={"clients": 2})
    plain = algorithm(train=PLAIN_SGD, federation={"clients": 2})
    results = []
    for one in (made, plain):
        state = one.initial(START)
        fits = [fit_by(one, Quadratic(c, {}), one.view(state, c)) for c in (0, 1)]
        results.append(
            (
                one.server_step([ClientUpdate(c, f.payload, 1.0) for c, f in enumerate(fits)], state, RoundContext(1)),
                fits,
            )
        )
    assert same(dense(results[0][0]), dense(results[1][0]))
    controls = [scaffold.split(f.kept)[1] for f in results[0][1]]
    server = results[0][0].memory["scaffold"]
    assert all(torch.allclose(server[n], (controls[0][n] + controls[1][n]) / 2) for n in to_tensors(START))
    assert server["heard"].tolist() == [1, 1]


def test_the_proximal_terms_gradient_is_mu_times_the_distance() -> None:
    start = to_tensors(START)
    now: dict[str, Any] = {k: t.clone().requires_grad_() for k, t in to_tensors(adapter(1)).items()}
    proximal(now, start, 0.3).backward()  # type: ignore[no-untyped-call]
    for name, tensor in now.items():
        assert torch.allclose(tensor.grad, 0.3 * (tensor.detach() - start[name]))


def _gram(points: Tensor) -> Tensor:
    return points @ points.T


RULES = list(rules.RULES)
CHOSEN = RobustSettings(malicious=1)


@pytest.mark.parametrize("rule", RULES)
def test_rules_do_not_care_for_the_order(rule: str) -> None:
    points = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = torch.tensor([3, 1, 5, 0, 4, 2])
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    one = rules.RULES[rule](_gram(points), weights, CHOSEN)
    two = rules.RULES[rule](_gram(points[turned]), weights[turned], CHOSEN)
    assert torch.allclose(one[turned], two)


@pytest.mark.parametrize("rule", RULES)
def test_rules_ignore_an_outlier_and_keep_honest_clients(rule: str) -> None:
    generator = torch.Generator().manual_seed(2)
    honest = torch.randn(6, 50, dtype=torch.float64, generator=generator)
    far = torch.cat([honest, torch.full((1, 50), 1e6, dtype=torch.float64)])
    weights = rules.RULES[rule](_gram(far), torch.ones(7, dtype=torch.float64), CHOSEN)
    if rule == "foolsgold":
        return  # it is after clients that are alike, not far
    centre = (weights / weights.sum()) @ far
    assert float(centre.norm()) < 20.0
    assert float(weights[:6].sum()) > 0


def test_foolsgold_weighs_down_sybils() -> None:
    generator = torch.Generator().manual_seed(3)
    honest = torch.randn(5, 200, dtype=torch.float64, generator=generator)
    sybils = torch.ones(3, 200, dtype=torch.float64) + 1e-3 * torch.randn(3, 200, generator=generator).double()
    weights = rules.foolsgold(_gram(torch.cat([honest, sybils])), torch.ones(8, dtype=torch.float64), CHOSEN)
    assert float(weights[5:].max()) < 0.05 * float(weights[:5].min())
    alike = torch.ones(3, 4, dtype=torch.float64)
    assert torch.equal(rules.foolsgold(_gram(alike), torch.ones(3).double(), CHOSEN), torch.ones(3).double())


def test_the_geometric_median_on_a_line_is_the_median_and_moves_with_its_points() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [100.0]], dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.float64)
    many = RobustSettings(iterations=2000)
    for shift in (0.0, 7.0):
        weights = rules.geometric_median(_gram(line + shift), ones, many)
        assert float((weights / weights.sum()) @ (line + shift)[:, 0]) == pytest.approx(2.0 + shift, abs=0.02)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 10.0))
def test_no_update_counts_for_more_than_the_clip(limit: float) -> None:
    points = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 5
    weights = torch.ones(5, dtype=torch.float64)
    shares, rest = rules.clip_shares(_gram(points), weights, limit)
    clipped = points * (limit / points.norm(dim=1, keepdim=True)).clamp(max=1)
    assert torch.allclose(shares @ points, clipped.sum(0))
    assert float(shares.sum()) + rest == pytest.approx(5.0)


def _attacked(kind: str, **changes: Any) -> float:
    """Return how far the aggregate of nine honest clients and an attacker is from the honest mean, relatively."""
    made = algorithm(attack={"kind": kind, "clients": [0], "scale": 100.0}, federation={"clients": 10}, **changes)
    start = to_tensors(START)
    sent = []
    for client in range(10):
        generator = torch.Generator().manual_seed(client)
        near = {n: t + 0.1 + 0.05 * torch.randn(t.shape, dtype=t.dtype, generator=generator) for n, t in start.items()}
        payload = attack.tampered(near, start, made.config.attack, client, seed=1)
        sent.append(ClientUpdate(client, payload, 1.0))
    honest = made.method.server_step(sent[1:], made.initial(START), RoundContext(1))
    got, want, was = (
        dense(made.server_step(sent, made.initial(START), RoundContext(1))),
        dense(honest),
        mean([START], [1.0]),
    )
    gap = sum(float((got[p] - want[p]).norm() ** 2) for p in got) ** 0.5
    return gap / sum(float((want[p] - was[p]).norm() ** 2) for p in got) ** 0.5


@pytest.mark.parametrize("kind", ["sign-flip", "boost", "random"])
@pytest.mark.parametrize("method", ["flora", "flexlora", "fedmomentum"])
def test_a_robust_rule_resists_what_the_mean_does_not(kind: str, method: str) -> None:
    chosen = {"method": {"name": method}}
    assert _attacked(kind, **chosen) > 3
    for rule in ("krum", "multi-krum", "geometric-median", "trimmed"):
        assert _attacked(kind, robust={"rule": rule}, **chosen) < 1.2, rule
    assert _attacked(kind, robust={"clip_norm": "median"}, **chosen) < 1.2


def test_a_gauge_attack_hits_the_mean_of_factors_and_nothing_in_product_space() -> None:
    assert _attacked("gauge") > 3
    for method in ("flora", "flexlora", "fedex_lora", "fedmomentum"):
        assert _attacked("gauge", method={"name": method}) < 0.2, method


def test_a_round_at_rate_zero_leaves_the_controls_as_they_are() -> None:
    made = algorithm(drift={"scaffold": True}, train={"optimizer": "sgd"}, federation={"clients": 2})
    first = fit_by(made, Quadratic(0, {}), made.view(made.initial(START), 0))
    state = made.server_step([ClientUpdate(0, first.payload, 1.0)], made.initial(START), RoundContext(1))
    local = Quadratic(0, first.kept)
    local.round, local.rate = 2, 0.0
    last = fit_by(made, local, made.view(state, 0))
    assert not any(t.any() for t in scaffold.split(last.payload)[1].values())
    before, after = scaffold.split(first.kept)[1], scaffold.split(last.kept)[1]
    assert all(torch.equal(before[n], after[n]) for n in to_tensors(START))


def test_scaffolds_controls_are_the_mean_of_the_gradients_that_steps_are_made_of() -> None:
    """Clipped ones, where the loss's gradient is clipped: x - y = K lr (clip(g) + c - c_i), and so c_i+ = clip(g)."""
    from fedtune.config.schema import TrainSettings
    from fedtune.training.executor import make_step
    from fedtune.training.executor import optimizer as made_by

    start, slope = {"p": torch.zeros(2)}, torch.tensor([30.0, 40.0])
    rate, limit = 0.1, 1.0

    class Clipped:
        client, round, phase, steps, kept, layout = 0, 1, 1, 3, {}, START

        def __init__(self) -> None:
            self.rate = rate

        def train(self, begun: Any, names: Any, term: Any = None, masks: Any = None, correction: Any = None) -> Any:
            parameter = torch.nn.Parameter(begun["p"].clone())
            stepper = made_by([([parameter], rate)], TrainSettings(optimizer="sgd"))
            for _ in range(self.steps):
                stepper.zero_grad(set_to_none=True)
                (parameter @ slope).backward()  # type: ignore[no-untyped-call]
                make_step(Train(begun, names, term, masks, correction), {"p": parameter}, [parameter], limit, stepper)
            return {"p": parameter.detach()}

    server, own = {"p": torch.tensor([5.0, -2.0])}, {"p": torch.tensor([1.0, 3.0])}
    work: Any = Clipped()
    _, changes = ran_by(work, scaffold.corrected(asking(Train(start, ["p"])), server, own, work))
    assert torch.allclose(own["p"] + changes["p"], slope / slope.norm() * limit, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_scaffolds_bounds_leave_honest_controls_as_they_are(decay: float, size: float) -> None:
    """An honest control is at most a clipped gradient, however large the model and its decay are."""
    made = algorithm(drift={"scaffold": True}, train={"optimizer": "sgd", "weight_decay": decay})
    state = ServerState({p: replace(m, a=size * m.a, b=size * m.b) for p, m in START.items()})
    upload, largest = made.upload(state, 0, 1), 0.999 * made.config.train.max_grad_norm
    controls = {n: largest * t / t.norm() for n, t in to_tensors(state.adapter).items()}
    for name in controls:  # from one control of that size to its opposite; and a mean of such controls
        wire = scaffold.CONTROL + name
        assert upload.growth(wire) + float(upload.tensors[wire].norm()) >= 2 * largest
    kept = scaffold.bounded(controls, made.config.train)
    assert all(torch.equal(kept[n], controls[n]) for n in controls)
    wild = scaffold.bounded({n: 1e6 * t for n, t in controls.items()}, made.config.train)
    assert all(float(wild[n].norm()) < 1.01 * largest for n in wild)


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.1])
def test_scaffolds_steps_reach_three_clipped_gradients_and_the_models_own_decay(decay: float) -> None:
    """The loss's gradient, c and c_i; no room is left for the decay of a model of another size."""
    from fedtune.methods import sound

    train = algorithm(train={"optimizer": "sgd", "weight_decay": decay}).config.train
    plain, corrected = sound.reach(train, 1e-2, 10), sound.reach(scaffold.correcting(train), 1e-2, 10)
    assert corrected.share == plain.share
    assert corrected.most == pytest.approx(3 * plain.most)


@pytest.mark.parametrize("rate", [0.1, 1e-3, 5e-5])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_scaffolds_controls_have_their_digits_at_any_rate(kind: torch.dtype, rate: float) -> None:
    """They are option II's c_i - c + (x - y) / (K lr) without decay in float64; in float32 x - y would have lost them at a small rate."""
    from fedtune.config.schema import TrainSettings
    from fedtune.training.executor import make_step
    from fedtune.training.executor import optimizer as made_by

    seen: list[Tensor] = []
    decays: list[Tensor] = []

    class Bowl:
        client, round, phase, steps, kept, layout = 0, 1, 1, 20, {}, START

        def __init__(self) -> None:
            self.rate = rate

        def train(self, begun: Any, names: Any, term: Any = None, masks: Any = None, correction: Any = None) -> Any:
            parameter = torch.nn.Parameter(begun["p"].clone())
            stepper = made_by([([parameter], rate)], TrainSettings(optimizer="sgd", weight_decay=1e-3))
            for _ in range(self.steps):
                stepper.zero_grad(set_to_none=True)
                (0.01 * (parameter - 3.0).square().sum()).backward()  # type: ignore[no-untyped-call]
                raw = 0.02 * (parameter.detach().double() - 3.0)
                seen.append(raw * min(1.0, 0.05 / float(raw.norm())))
                decays.append(1e-3 * parameter.detach().double())
                make_step(Train(begun, names, term, masks, correction), {"p": parameter}, [parameter], 0.05, stepper)
            return {"p": parameter.detach()}

    begun, own = {"p": torch.tensor([40.0, -7.0], dtype=kind)}, {"p": torch.tensor([0.3, -0.2], dtype=kind)}
    for _ in range(12):
        seen.clear()
        decays.clear()
        server = {"p": 0.5 * own["p"]}
        work: Any = Bowl()
        after, changes = ran_by(work, scaffold.corrected(asking(Train(begun, ["p"])), server, own, work))
        told = own["p"] - server["p"] + (begun["p"] - after["p"]) / (20 * rate) - torch.stack(decays).mean(0)
        own = {"p": own["p"] + changes["p"]}
        assert float((own["p"] - torch.stack(seen).mean(0)).norm()) < 1e-5 * float(own["p"].norm())
        if kind == torch.float64:
            assert torch.allclose(own["p"], told, rtol=1e-8)


@pytest.mark.parametrize("kind", ["boost", "sign-flip", "random"])
def test_an_attacker_with_magnitudes_that_learned_nothing_sends_the_unchanged_model(kind: str) -> None:
    """What it starts from is compared in the form in which it is sent: D and D * B, not m and B."""
    from dataclasses import replace

    made = algorithm(
        method={"name": "flexlora"}, lora={"dora": True}, attack={"kind": kind, "clients": [0], "scale": 2.0}
    )
    begun = {p: replace(m, magnitude=torch.full((m.b.shape[0],), 3.0).double()) for p, m in START.items()}
    state = made.initial(begun)
    relative = {p: replace(m, magnitude=m.magnitude * 0.7) for p, m in state.adapter.items()}  # type: ignore[operator]
    state = replace(state, adapter=relative)

    class Idle:
        client, round, phase, rate, steps, kept, layout = 0, 2, 1, 0.1, 1, {}, begun

        def train(self, start: Any, names: Any, *_: Any) -> Any:
            return dict(start)

        def row_norms(self, at: Any) -> dict[str, Tensor]:
            return {p: torch.linspace(1, 2, m.b.shape[0]).double() for p, m in START.items()}

    bad = fit_by(made, Idle(), made.view(state, 0)).payload
    honest = fit_by(algorithm(method={"name": "flexlora"}, lora={"dora": True}), Idle(), made.view(state, 0)).payload
    assert all(torch.allclose(bad[n], honest[n], atol=1e-12) for n in honest)


def test_an_attacker_that_sends_some_ranks_is_compared_with_those() -> None:
    start = {"x.lora_A.weight": torch.arange(12.0).reshape(4, 3)}
    chosen = AttackSettings(kind="boost", clients=(0,), scale=2.0)
    first = attack.tampered({"x.lora_A.weight": start["x.lora_A.weight"][:2] + 1}, start, chosen, 0, 0)
    assert torch.equal(first["x.lora_A.weight"], start["x.lora_A.weight"][:2] + 2)
    ranks = torch.tensor([1, 3])
    some = {"x.lora_A.weight": start["x.lora_A.weight"][ranks] + 1, "x.lora_A.weight.chosen": ranks}
    assert torch.equal(
        attack.tampered(some, start, chosen, 0, 0)["x.lora_A.weight"], start["x.lora_A.weight"][ranks] + 2
    )


def test_attackers_are_only_those_named() -> None:
    payload = {"x": torch.ones(3)}
    chosen = AttackSettings(kind="boost", clients=(1,), scale=3.0)
    assert attack.tampered(payload, {"x": torch.zeros(3)}, chosen, 0, 0) is payload
    assert torch.equal(attack.tampered(payload, {"x": torch.zeros(3)}, chosen, 1, 0)["x"], torch.full((3,), 3.0))


def test_ranks_are_dealt_by_share() -> None:
    config = Config.model_validate(
        {"domain": "x", "lora": {"r": 16, "ranks": {4: 0.5, 8: 0.3, 16: 0.2}}, "federation": {"clients": 10}}
    )
    dealt = sorted(client_ranks(config).values())
    assert dealt == [4] * 5 + [8] * 3 + [16] * 2
    assert client_ranks(config) == client_ranks(config)
    assert build(config).run.ranks[0] in (4, 8, 16)
    with pytest.raises(ValueError, match=r"sum to 0\.5, not to 1"):
        Config.model_validate({"domain": "x", "lora": {"ranks": {4: 0.5}}})
    with pytest.raises(ValueError, match="rank 32 is above the global rank r = 16"):
        Config.model_validate({"domain": "x", "lora": {"ranks": [32]}})


def test_every_method_takes_a_server_step_inside_a_recipe() -> None:
    for name in METHODS:
        made = algorithm(method={"name": name})
        state: ServerState = made.initial(START)
        assert set(made.upload(state, 0, 1).tensors)
        assert made.view(state, 0)
