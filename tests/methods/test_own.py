"""What is each method's own: golden numbers, limits, and the errors published code of it has made."""

import itertools
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedtune.lora import base_delta, product
from fedtune.lora.state import PREFIX, AdapterState, LoraModule, fresh, to_tensors, with_rank, with_tensors
from fedtune.methods import ClientUpdate, Method, RoundContext, RunContext, ServerState
from fedtune.methods.aggregation import aggregate
from fedtune.methods.fed_sb import FedSB
from fedtune.methods.fedalt import FedALT, rest_of_world
from fedtune.methods.fedask import FedASK
from fedtune.methods.fedex_lora import FedExLoRA
from fedtune.methods.fedilora import FediLoRA, agreement
from fedtune.methods.fedkseed import FedKSeed
from fedtune.methods.fedrot_lora import FedRotLoRA
from fedtune.methods.fedsvd import FedSVD
from fedtune.methods.flora import FLoRA
from fedtune.methods.hetlora import HetLoRA
from fedtune.methods.lora_a2 import LoRAA2
from fedtune.methods.moves_base import MovesBase
from fedtune.methods.rbla import RBLA
from fedtune.methods.state import mean as weighted
from tests.clients import begun_by, completed, fit_by
from tests.faults.hostile import Toy
from tests.methods.test_methods import IN, OUT, START, adapter, dense, make, mean, run, same

A, B = ".lora_A.weight", ".lora_B.weight"
NAME = "layer.0.q"


def updates(*seeds: int, weights: tuple[float, ...] = ()) -> list[ClientUpdate]:
    shares = weights or (1.0,) * len(seeds)
    return [ClientUpdate(i, to_tensors(adapter(s)), w) for i, (s, w) in enumerate(zip(seeds, shares, strict=True))]


def test_fedit_is_off_by_the_covariance_of_the_factors() -> None:
    after = (
        make("fedit").server_step(updates(1, 2, weights=(1.0, 3.0)), ServerState(START), RoundContext(1)).adapter[NAME]
    )
    one, two = adapter(1)[NAME], adapter(2)[NAME]
    assert torch.allclose(after.a, 0.25 * one.a + 0.75 * two.a)
    assert torch.allclose(after.b, 0.25 * one.b + 0.75 * two.b)
    ideal = mean([adapter(1), adapter(2)], [1.0, 3.0])[NAME]
    spread = sum(w * (m.b - after.b) @ (m.a - after.a) for w, m in ((0.25, one), (0.75, two)))
    assert torch.allclose(ideal - after.scale * after.b @ after.a, after.scale * spread)


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "lora_a2"])
@pytest.mark.parametrize("round_", [1, 2])
def test_a_frozen_factor_stays_bit_for_bit(name: str, round_: int) -> None:
    method = make(name)
    sent = [
        replace(u, tensors={n: t for n, t in u.tensors.items() if method.trainable(round_, n)}) for u in updates(1, 2)
    ]
    if name == "lora_a2":
        whole = {n + ".chosen": torch.arange(2) for u in sent for n in u.tensors}
        sent = [replace(u, tensors={**u.tensors, **whole}) for u in sent]
    after = to_tensors(method.server_step(sent, ServerState(START), RoundContext(round_)).adapter)
    before = to_tensors(START)
    frozen = [n for n in before if not method.trainable(round_, n)]
    assert frozen
    assert all(torch.equal(after[n], before[n]) for n in frozen)
    assert all(not torch.equal(after[n], before[n]) for n in before if n not in frozen)


def test_alternating_methods_train_b_first() -> None:
    names = [PREFIX + "x" + end for end in (A, B)]
    for name in ("rolora", "lora_a2"):
        assert [[make(name).trainable(r, n) for n in names] for r in (1, 2)] == [[False, True], [True, False]]


def test_fedex_in_factors_is_the_residual_and_has_n_minus_one_blocks() -> None:
    for seeds in ([1], [1, 2], [1, 2, 3]):
        clients, weights = [adapter(s) for s in seeds], [float(s) for s in seeds]
        for path in START:
            modules = [c[path] for c in clients]
            rest = product.residual(modules, weights)
            assert rest.inner == (len(seeds) - 1) * 2
            plain = run(make("fedit"), clients, weights)[path]
            # an untransposed residual on a layer that is not square, and with the layer's own scale
            assert rest.left.shape[0] == OUT
            assert rest.right.shape[1] == IN
            assert torch.allclose(rest.dense(), mean(clients, weights)[path] - plain, atol=1e-10)


def test_fedex_truncated_keeps_the_best_part_of_the_residual() -> None:
    clients, weights = [adapter(s) for s in (1, 2, 3)], [1.0, 1.0, 1.0]
    got = run(make("fedex_lora", residual_rank=1), clients, weights)
    for path in START:
        whole = product.residual([c[path] for c in clients], weights)
        tail = torch.linalg.svdvals(whole.dense())[1:].norm()
        assert torch.allclose((got[path] - mean(clients, weights)[path]).norm(), tail)


def test_flora_uses_every_clients_own_scale_and_weighs_one_factor() -> None:
    clients, weights = [adapter(1, 1, 4.0), adapter(2, 3, 16.0)], [1.0, 5.0]
    assert same(run(make("flora"), clients, weights), mean(clients, weights))
    after = aggregate(make("flora"), clients, weights, ServerState(START))[0]
    assert base_delta.join(after.base)[NAME].inner == 4
    assert all(not m.b.any() and m.a.any() for m in after.adapter.values())


def test_a_fresh_adapter_is_the_same_everywhere_and_new_in_every_round() -> None:
    small = {p: with_rank(m, 1) for p, m in START.items()}
    one, other, part = fresh(START, 3, 2), fresh(START, 3, 3), fresh(small, 3, 2)
    assert all(torch.equal(one[p].a, fresh(START, 3, 2)[p].a) for p in START)
    assert all(not torch.equal(one[p].a, other[p].a) for p in START)
    assert all(torch.equal(one[p].a[:1], part[p].a) for p in START)
    assert all(float(m.a.abs().max()) <= IN**-0.5 for m in one.values())


def test_flexlora_is_the_best_rank_r_approximation_and_nested() -> None:
    clients, weights = [adapter(s) for s in (1, 2, 3)], [1.0, 2.0, 3.0]
    state = ServerState(START)
    method = make("flexlora")
    four, two = (aggregate(method, clients, weights, state, r)[0].adapter for r in (4, 2))
    for path in START:
        ideal = mean(clients, weights)[path]
        values = torch.linalg.svdvals(ideal)
        gap = ideal - two[path].scale * two[path].b @ two[path].a
        assert torch.allclose(gap.norm() ** 2, values[2:].square().sum())
        cut = with_rank(four[path], 2)
        assert torch.allclose(cut.scale * cut.b @ cut.a, two[path].scale * two[path].b @ two[path].a)
    whole = run_at(method, clients, weights, 6)
    assert same(whole, mean(clients, weights))


def run_at(method: Method, clients: list[AdapterState], weights: list[float], rank: int) -> dict[str, Tensor]:
    return dense(aggregate(method, clients, weights, ServerState(START), rank)[0])


def test_hlora_splits_the_singular_values_evenly() -> None:
    after = aggregate(make("hlora"), [adapter(1), adapter(2)], [1.0, 1.0], ServerState(START))[0].adapter[NAME]
    assert torch.allclose(after.b.norm(dim=0), after.a.norm(dim=1))


@pytest.mark.parametrize("name", ["flexlora", "hlora", "florist", "fedmomentum", "fedask"])
def test_a_product_of_a_smaller_rank_has_zeros_and_no_nan_in_float32(name: str) -> None:
    for part in (0, 1):  # nothing learned at all, and one component of two
        clients = []
        for seed in (1, 2):
            own = {p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in adapter(1).items()}
            for module in own.values():
                module.b[:, part:] = 0
                module.b[:, :part] *= seed
            clients.append(own)
        start = ServerState({p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in START.items()})
        got = dense(aggregate(make(name), clients, [1.0, 1.0], start)[0])
        want = mean(clients, [1.0, 1.0])
        assert all(torch.allclose(got[p], want[p], atol=1e-4) for p in want)


def test_florist_keeps_the_energy_it_was_asked_for() -> None:
    clients, weights = [adapter(1), adapter(2)], [1.0, 1.0]
    for tau in (0.3, 0.6, 0.9, 1.0):
        got = run_at(make("florist", tau=tau), clients, weights, 5)[NAME]
        values = torch.linalg.svdvals(mean(clients, weights)[NAME])
        kept = int(torch.linalg.matrix_rank(got))
        share = values.square().cumsum(0) / values.square().sum()
        assert share[kept - 1] >= tau - 1e-9
        assert kept == 1 or share[kept - 2] < tau


def test_fedmomentum_splits_the_mean_exactly() -> None:
    clients, weights = [adapter(s) for s in (1, 2, 3)], [1.0, 2.0, 3.0]
    after = aggregate(make("fedmomentum"), clients, weights, ServerState(START))[0]
    flex = aggregate(make("flexlora"), clients, weights, ServerState(START))[0]
    assert same(dense(replace(after, base=())), dense(flex))
    assert same(dense(after), mean(clients, weights))


def test_rbla_returns_a_row_with_one_owner_unchanged_and_has_no_nan() -> None:
    small, large = adapter(1, 1), adapter(2, 3)
    after = aggregate(make("rbla"), [small, large], [1.0, 9.0], ServerState(START))[0].adapter[NAME]
    assert torch.allclose(after.a[1:], large[NAME].a[1:])
    assert torch.allclose(after.a[0], 0.1 * small[NAME].a[0] + 0.9 * large[NAME].a[0])
    assert torch.allclose(after.b[:, 1:], large[NAME].b[:, 1:])
    alone = RBLA(RBLA.Parameters()).merge(with_rank(large[NAME], 5), [small[NAME]], [1.0])
    assert torch.isfinite(alone.a).all()
    assert torch.isfinite(alone.b).all()
    equal = [adapter(1), adapter(2)]
    assert same(run(make("rbla"), equal, [1.0, 2.0]), run(make("fedit"), equal, [1.0, 2.0]))


def test_hetlora_weighs_by_the_norm_of_the_product() -> None:
    one, two = adapter(1), adapter(2)
    assert product.size(one[NAME]) == pytest.approx(float(one[NAME].delta().norm()))
    after = aggregate(make("hetlora"), [one, two], [1.0, 1.0], ServerState(START))[0].adapter[NAME]
    w1, w2 = product.size(one[NAME]), product.size(two[NAME])
    assert torch.allclose(after.a, (w1 * one[NAME].a + w2 * two[NAME].a) / (w1 + w2))
    doubled = {p: replace(m, a=m.a / 2, b=m.b * 2) for p, m in one.items()}
    assert product.size(doubled[NAME]) == pytest.approx(product.size(one[NAME]))


def test_hetloras_penalty_has_a_gradient_and_only_on_the_tail() -> None:
    method = cast(HetLoRA, make("hetlora", gamma=0.5, regulariser=0.1))
    now: dict[str, Any] = {n: t.clone().requires_grad_() for n, t in to_tensors(adapter(1, 4)).items()}
    term = method.penalty(now)
    assert term is not None
    term.backward()
    grad = now[PREFIX + NAME + A].grad
    assert not grad[:2].any()
    assert grad[2:].any()
    a, b = now[PREFIX + NAME + A].detach(), now[PREFIX + NAME + B].detach()
    assert torch.allclose(grad[2:], 0.1 * b[:, 2:].norm() * a[2:] / a[2:].norm(), atol=1e-6)


def test_fedilora_repairs_the_layer_that_agrees_least() -> None:
    method = cast(FediLoRA, make("fedilora", repair=0.5))
    start = to_tensors(START)
    trained = {**start, PREFIX + NAME + A: -start[PREFIX + NAME + A]}
    sent = method.repaired(trained, start)
    assert torch.allclose(sent[PREFIX + NAME + A], torch.zeros_like(trained[PREFIX + NAME + A]))
    assert all(torch.equal(sent[n], trained[n]) for n in sent if NAME not in n)
    zero = torch.zeros(2, 3)
    assert agreement(zero, torch.zeros(4, 2), zero, torch.zeros(4, 2)) == 1.0


def test_fedsvd_keeps_the_product_and_has_orthonormal_rows() -> None:
    method = cast(FedSVD, make("fedsvd"))
    sent = [replace(u, tensors={n: t for n, t in u.tensors.items() if B in n}) for u in updates(1, 2)]
    after = method.server_step(sent, ServerState(START), RoundContext(1)).adapter[NAME]
    assert torch.allclose(after.a @ after.a.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    gram = after.b.T @ after.b
    assert torch.allclose(gram, torch.diag(torch.diag(gram)), atol=1e-10)
    zero = replace(START[NAME], b=torch.zeros_like(START[NAME].b))
    assert torch.equal(method.orthogonalise(zero).a, zero.a)


def test_fedrot_keeps_every_product_and_makes_pure_rotations_exact() -> None:
    method = cast(FedRotLoRA, make("fedrot_lora"))
    state, start = ServerState(START), to_tensors(START)
    for round_ in (2, 3):
        sent = with_tensors(START, method.payload(to_tensors(adapter(1)), start, round_))
        for path, module in sent.items():
            assert torch.allclose(module.delta(), adapter(1)[path].delta())
        was, now, reference = adapter(1)[NAME], sent[NAME], START[NAME]
        moved = (now.a - reference.a).norm() if round_ % 2 else (now.b - reference.b).norm()
        still = (was.a - reference.a).norm() if round_ % 2 else (was.b - reference.b).norm()
        assert moved <= still + 1e-12
    rotated = []
    for client in range(3):
        turn = product.nearest_orthogonal(torch.randn(2, 2, dtype=torch.float64))
        turned = {p: replace(m, a=turn.T @ m.a, b=m.b @ turn) for p, m in adapter(1).items()}
        rotated.append(ClientUpdate(client, method.payload(to_tensors(turned), start, 3), 1))
    assert same(dense(method.server_step(rotated, state, RoundContext(3))), mean([adapter(1)], [1.0]))


def test_lora_fair_lies_between_fedit_and_the_projection() -> None:
    clients, weights = [adapter(1), adapter(2)], [1.0, 1.0]
    ideal, plain = mean(clients, weights)[NAME], run(make("fedit"), clients, weights)[NAME]

    def after(ridge: float) -> Tensor:
        return run(make("lora_fair", ridge=ridge), clients, weights)[NAME]

    assert torch.allclose(after(1e12), plain, atol=1e-8)
    basis = torch.linalg.qr(((clients[0][NAME].a + clients[1][NAME].a) / 2).T)[0]
    assert torch.allclose(after(1e-12), ideal @ basis @ basis.T, atol=1e-8)
    assert (ideal - after(0.01)).norm() < (ideal - plain).norm()


def test_fedask_gets_better_with_the_width_and_exact_at_the_rank() -> None:
    clients, weights = [adapter(s) for s in (1, 2)], [1.0, 2.0]
    ideal = mean(clients, weights)[NAME]
    errors = [float((run(make("fedask", width=w), clients, weights)[NAME] - ideal).norm()) for w in (1, 2, 3, 4, 5)]
    assert all(b <= a + 1e-10 for a, b in itertools.pairwise(errors))
    assert errors[0] > 0.1
    assert errors[3] < 1e-10
    dropped = run(make("fedask", rest="drop"), clients, weights)
    assert same(dropped, run(make("flexlora"), clients, weights))


def test_fedask_needs_sums_only() -> None:
    """The second exchange of clients one by one adds up to that of all."""
    method = cast(FedASK, make("fedask"))
    clients, widths = [adapter(1), adapter(2)], dict.fromkeys(START, 4)
    first = [ClientUpdate(i, method.first(c, widths, 1), 1.0) for i, c in enumerate(clients)]
    middle = method.server_step(first, ServerState(START), RoundContext(1))
    bases = {n.removeprefix("fedask/Q/"): t for n, t in middle.extra.items()}
    parts = [method.second(c, bases) for c in clients]
    for path in START:
        got = bases[path] @ sum(p[f"fedask/P/{path}"] for p in parts) / 2
        assert torch.allclose(got, mean(clients, [1.0, 1.0])[path], atol=1e-10)


def test_fed_sb_averages_the_core_and_keeps_the_bases() -> None:
    method = cast(FedSB, make("fed_sb"))
    layout = START
    generator = torch.Generator().manual_seed(5)
    gradient = {p: torch.randn(OUT, 2, generator=generator, dtype=torch.float64) for p in layout}
    gradient = {p: g @ torch.randn(2, IN, generator=generator, dtype=torch.float64) for p, g in gradient.items()}

    class Fake:
        client, round, phase, kept, rate, steps = 0, 1, 1, {}, 0.1, 1

        def __init__(self) -> None:
            self.layout = layout

        def gradients(self, at: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
            found = {}
            for name in names:
                path = name.removeprefix(PREFIX).rsplit(".lora_", 1)[0]
                a, b = at[PREFIX + path + A], at[PREFIX + path + B]
                found[name] = gradient[path] @ a.T if name.endswith(B) else b.T @ gradient[path]
            return found

    sketches = fit_by(method, Fake(), {**to_tensors(layout)}).payload
    assert set(sketches) == set(method.upload(ServerState(START), 0, 1).tensors)
    state = method.server_step([ClientUpdate(0, sketches, 3.0)], ServerState(START), RoundContext(1))
    for path in START:
        u, vh = state.extra["fed_sb/basis/" + path], state.adapter[path].a
        # the sketches alone give the gradient's main directions
        assert torch.allclose(u @ (u.T @ gradient[path]), gradient[path], atol=1e-8)
        assert torch.allclose((gradient[path] @ vh.T) @ vh, gradient[path], atol=1e-8)
        assert not state.adapter[path].delta().any()
    cores = [{n: torch.randn(2, 2, dtype=torch.float64) for n in method.upload(state, 0, 2).tensors} for _ in range(2)]
    after = method.server_step([ClientUpdate(i, c, 1.0) for i, c in enumerate(cores)], state, RoundContext(2))
    for path in START:
        u, vh = state.extra["fed_sb/basis/" + path], state.adapter[path].a
        name = PREFIX + path + ".lora_R.weight"
        ideal = sum(0.5 * u @ c[name] @ vh for c in cores) * START[path].scale
        made = after.adapter[path]
        assert torch.allclose(made.scale * made.b @ made.a, ideal)
        assert torch.equal(after.extra["fed_sb/basis/" + path], u)
        assert torch.equal(made.a, vh)
    assert set(method.view(after, 0)) == {n for n in after.extra if n.endswith("lora_R.weight")}
    assert len(method.view(after, 7)) == 3 * len(START)


def test_lora_a2_sends_the_ranks_that_changed_most_within_the_budget() -> None:
    method = cast(LoRAA2, LoRAA2(LoRAA2.Parameters(), RunContext(ranks={0: 1})))
    start, trained = to_tensors(START), to_tensors(START)
    names = [n for n in start if n.endswith(B)]
    trained[names[0]] = start[names[0]] + torch.tensor([[1.0, 100.0]] * OUT, dtype=torch.float64)
    trained[names[1]] = start[names[1]] + torch.tensor([[50.0, 0.0]] * OUT, dtype=torch.float64)
    chosen = method.choose(trained, start, names, method.budget(START, 0))
    assert method.budget(START, 0) == 2
    assert {n: c.tolist() for n, c in chosen.items()} == {names[0]: [1], names[1]: [0]}
    sent = {n: trained[n].index_select(1, chosen[n]) for n in names}
    payload = {**sent, **{n + ".chosen": chosen[n] for n in names}}
    state = ServerState(START)
    assert method.upload(state, 0, 1, 6).problem(payload) == ""
    whole = completed(method, ClientUpdate(0, payload, 1.0), state)
    assert torch.equal(whole[NAME].b[:, 0], START[NAME].b[:, 0])
    assert torch.equal(whole[NAME].b[:, 1], trained[names[0]][:, 1])
    twice = {**payload, names[0] + ".chosen": torch.tensor([1, 1]), names[0]: trained[names[0]]}
    assert "a rank comes twice" in method.upload(state, 0, 1, 6).problem(twice)
    wide = {**payload, names[0] + ".chosen": torch.tensor([0, 1]), names[0]: trained[names[0]]}
    assert "3 ranks, the budget is 2" in method.upload(state, 0, 1, 6).problem(wide)
    assert "ranks outside" in method.upload(state, 0, 1, 6).problem(
        {**payload, names[0] + ".chosen": torch.tensor([9])}
    )
    assert "for 1 ranks" in method.upload(state, 0, 1, 6).problem({**payload, names[0]: trained[names[0]]})


def test_fedalts_rest_of_the_world_is_the_mean_of_the_others() -> None:
    clients, weights = [adapter(s) for s in (1, 2, 3)], [1.0, 2.0, 5.0]
    method = cast(FedALT, make("fedalt"))
    after, own = aggregate(method, clients, weights, ServerState(START))
    rest = list(own or [])
    assert torch.allclose(rest[0][NAME].a, (2 * clients[1][NAME].a + 5 * clients[2][NAME].a) / 7)
    assert torch.allclose(rest[2][NAME].b, (clients[0][NAME].b + 2 * clients[1][NAME].b) / 3)
    alone = torch.ones(2)
    assert not rest_of_world(alone, alone, 1.0).any()
    sent = [ClientUpdate(i, to_tensors(c), w) for i, (c, w) in enumerate(zip(clients, weights, strict=True))]
    state = method.server_step(sent, ServerState(START), RoundContext(1))
    start = begun_by(method, START, method.view(state, 0), to_tensors(clients[0]), 2)
    assert torch.allclose(start[PREFIX + NAME + ".other_A.weight"], rest[0][NAME].a)
    assert torch.equal(start[PREFIX + NAME + A], clients[0][NAME].a)
    stranger = begun_by(method, START, method.view(state, 9), {}, 2)
    assert torch.allclose(stranger[PREFIX + NAME + ".other_A.weight"], after.adapter[NAME].a)


def test_fedalts_skipped_rounds_are_in_no_mean() -> None:
    """After any number of skipped rounds the rest of the world of two clients is still the other one."""
    method, state = make("fedalt"), ServerState(START)
    other_a = PREFIX + NAME + ".other_A.weight"
    kept: dict[int, dict[str, Tensor]] = {0: {}, 1: {}}

    def trained(round_: int) -> list[ClientUpdate]:
        sent = []
        for client in kept:
            local = Toy(client, round_, 1, START, kept[client])
            fitted = fit_by(method, local, begun_by(method, START, method.view(state, client), kept[client], round_))
            kept[client] = fitted.kept
            sent.append(ClientUpdate(client, fitted.payload, 8.0))
        return sent

    first = 1
    for skipped in (0, 1, 2):
        in_the_mean = trained(first)
        state = method.server_step(in_the_mean, state, RoundContext(first))
        for round_ in range(first + 1, first + 1 + skipped):
            trained(round_)
        start = begun_by(method, START, method.view(state, 0), kept[0], first + 1 + skipped)
        assert torch.allclose(start[other_a], in_the_mean[1].tensors[PREFIX + NAME + A], atol=1e-6)
        assert torch.equal(start[PREFIX + NAME + A], in_the_mean[0].tensors[PREFIX + NAME + A])
        first += 1 + skipped


def test_fedsa_never_shows_anyone_another_clients_b() -> None:
    method = make("fedsa_lora")
    clients = [adapter(1), adapter(2)]
    after, found = aggregate(method, clients, [1.0, 3.0], ServerState(START))
    assert not after.adapter[NAME].b.any()
    assert all(A in n for n in method.view(after, 0))
    own = list(found or [])
    assert torch.equal(own[1][NAME].b, clients[1][NAME].b)
    assert torch.allclose(own[0][NAME].a, 0.25 * clients[0][NAME].a + 0.75 * clients[1][NAME].a)


class Slope:
    """A client whose loss is a known quadratic, for zeroth-order steps."""

    phase, rate = 1, 0.1

    def __init__(self, client: int, steps: int = 6) -> None:
        self.client, self.round, self.steps = client, 1, steps
        self.kept: dict[str, Tensor] = {}
        self.layout = START

    def losses(self, step: int, points: list[dict[str, Tensor]]) -> list[float]:
        return [sum(float((t - 1 - self.client).square().sum()) for t in p.values()) for p in points]


def test_fedkseed_replays_bit_for_bit_and_in_any_order() -> None:
    method = cast(FedKSeed, make("fedkseed", seeds=16, learning_rate=1e-3))
    start32 = {p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in START.items()}
    state = ServerState(start32)
    begun = begun_by(method, start32, method.view(state, 0), {}, 1)
    sent = [ClientUpdate(c, fit_by(method, Slope(c), begun).payload, 1.0) for c in (0, 1)]
    assert set(sent[0].tensors) == {"fedkseed/scalars"}
    assert sent[0].tensors["fedkseed/scalars"].shape == (16,)
    after = method.server_step(sent, state, RoundContext(1))
    again = begun_by(method, start32, method.view(after, 5), {}, 2)
    assert all(torch.equal(again[n], t) for n, t in to_tensors(after.adapter).items())
    turned = method.server_step(sent[::-1], state, RoundContext(1))
    assert torch.equal(turned.extra["fedkseed/scalars"], after.extra["fedkseed/scalars"])
    # the server's replay is the mean of the clients' own walks
    wide = {n: t.double() for n, t in to_tensors(start32).items()}
    walks = [method.replay(wide, u.tensors["fedkseed/scalars"]) for u in sent]
    for name, tensor in method.replay(wide, after.extra["fedkseed/scalars"]).items():
        assert torch.allclose(tensor, (walks[0][name] + walks[1][name]) / 2, atol=1e-12)
    step = method.direction(3, wide)
    assert all(torch.equal(step[n], method.direction(3, wide)[n]) for n in step)


def test_fedkseed_takes_slopes_along_the_directions_of_the_clients_own_steps_alone() -> None:
    method = cast(FedKSeed, make("fedkseed", seeds=4096))
    start32 = {p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in START.items()}
    state, client = ServerState(start32), Slope(1)
    sent = fit_by(method, client, to_tensors(start32)).payload
    assert method.upload(state, 1, 1, client.steps).problem(sent) == ""
    for other, round_, steps in ((0, 1, client.steps), (1, 2, client.steps), (1, 1, client.steps - 1)):
        assert "that its steps do not take" in method.upload(state, other, round_, steps).problem(sent)
    everywhere = {n: t + 1e-30 * (t == 0) for n, t in sent.items()}
    assert "slopes along 4090 directions" in method.upload(state, 1, 1, client.steps).problem(everywhere)


def test_no_client_of_fedkseed_moves_the_model_by_slopes_much_steeper_than_the_others() -> None:
    method = cast(FedKSeed, make("fedkseed", seeds=4096))
    state = ServerState({p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in START.items()})
    begun = to_tensors(state.adapter)
    sent = [ClientUpdate(c, fit_by(method, Slope(c % 3, 6), begun).payload, 1.0, steps=6) for c in range(4)]
    honest = [float(u.tensors["fedkseed/scalars"].norm()) for u in sent]

    def moved(updates: list[ClientUpdate]) -> Tensor:
        return method.server_step(updates, state, RoundContext(1)).extra["fedkseed/scalars"]

    # what honest clients send counts bit for bit, also of one that makes many more steps and of one that finds nothing
    many = [replace(sent[0], tensors={n: 6 * t for n, t in sent[0].tensors.items()}, steps=600), *sent[1:]]
    still = [replace(sent[0], tensors={n: 0 * t for n, t in sent[0].tensors.items()}), *sent[1:]]
    for updates in (sent, many, still):
        assert torch.equal(moved(updates), weighted(updates)["fedkseed/scalars"])
    assert not moved([replace(u, tensors=still[0].tensors) for u in sent]).any()
    steep = torch.zeros(4096)
    steep[int(sent[3].tensors["fedkseed/scalars"].nonzero()[0])] = 999.0
    others = moved([*sent[:3], replace(sent[3], tensors={"fedkseed/scalars": torch.zeros(4096)})])
    for steps in (0, 1, 6):
        bad = moved([*sent[:3], replace(sent[3], tensors={"fedkseed/scalars": steep}, steps=steps)])
        assert float((bad - others).norm()) <= 5 * max(honest) / 4 * (1 + 1e-6)


def test_of_two_clients_of_fedkseed_that_found_a_slope_the_steeper_one_does_not_set_the_measure() -> None:
    method, name = cast(FedKSeed, make("fedkseed", seeds=3)), "fedkseed/scalars"
    state = ServerState({p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in START.items()})
    sent = [ClientUpdate(c, {name: s * torch.eye(3)[c]}, 1.0, steps=1) for c, s in enumerate((1.0, 0.0, 990.0))]
    assert torch.allclose(
        method.server_step(sent, state, RoundContext(1)).extra[name], torch.tensor([1 / 3, 0.0, 5 / 3])
    )


def test_fedkseed_goes_downhill() -> None:
    method = cast(FedKSeed, make("fedkseed", seeds=64, learning_rate=5e-3, steps=40))
    state = ServerState({p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in START.items()})
    begun, client = to_tensors(state.adapter), Slope(0)
    after = method.server_step([ClientUpdate(0, fit_by(method, client, begun).payload, 1.0)], state, RoundContext(1))
    one, two = client.losses(0, [begun, dict(to_tensors(after.adapter))])
    assert two < 0.8 * one


class Canned:
    """A client that trains to given tensors."""

    phase, rate, steps = 1, 0.1, 1

    def __init__(self, client: int, round_: int, kept: dict[str, Tensor]) -> None:
        self.client, self.round, self.kept, self.layout = client, round_, kept, START

    def train(self, start: Any, names: Any, *_: Any) -> dict[str, Tensor]:
        return {**start, **{n: t for n, t in to_tensors(adapter(10 * self.round + self.client)).items() if n in names}}


def _rounds(method: MovesBase, rounds: int, clients: list[int]) -> tuple[ServerState, dict[int, dict[str, Tensor]]]:
    """Let clients take part round by round, keeping what they keep; return the state and what each has."""
    state, kept = ServerState(START), {c: dict[str, Tensor]() for c in clients}
    for round_ in range(1, rounds + 1):
        sent = []
        for client in clients:
            if client == 1 and round_ % 2 == 0:
                continue  # misses every second round
            local = Canned(client, round_, kept[client])
            fitted = fit_by(method, local, begun_by(method, START, method.view(state, client), kept[client], round_))
            kept[client] = fitted.kept
            if client == 2 and round_ in (2, 3):
                continue  # its answer is lost, what it keeps is not
            sent.append(ClientUpdate(client, fitted.payload, 1.0))
        state = method.server_step(sent, state, RoundContext(round_))
    return state, kept


@pytest.mark.parametrize("cap", [0, 3])
@pytest.mark.parametrize("name", ["flora", "fedex_lora", "fedmomentum", "rac_lora"])
def test_side_adapters_reach_every_client_whatever_rounds_it_missed(name: str, cap: int) -> None:
    method = cast(MovesBase, make(name, base_rank=cap))
    state, kept = _rounds(method, 5, [0, 1, 2])
    whole = base_delta.join(state.base)
    for client in (0, 1, 2, 7):
        begun = begun_by(method, START, method.view(state, client), kept.get(client, {}), 6)
        mine = base_delta.from_side_tensors(begun)
        assert set(mine) == set(whole)
        assert all(torch.allclose(mine[p].dense(), whole[p].dense(), atol=1e-10) for p in whole)
    if cap:
        assert all(p.inner <= cap for p in whole.values())
    elif name == "flora":
        fewer = sum(t.numel() for t in method.view(state, 0).values())
        assert fewer <= sum(t.numel() for t in method.view(state, 7).values())


@pytest.mark.parametrize("cap", [0, 10**9])
def test_compression_without_a_cap_that_cuts_loses_nothing(cap: int) -> None:
    wide = product.stack([adapter(s)[NAME] for s in range(8)], [1.0] * 8)
    pieces = base_delta.append((), 1, {NAME: wide}, cap)
    assert len(pieces) == 1
    assert base_delta.join(pieces)[NAME].inner == min(OUT, IN)
    assert torch.allclose(base_delta.join(pieces)[NAME].dense(), wide.dense(), atol=1e-10)
    more = base_delta.append(pieces, 2, {NAME: wide}, cap)
    assert torch.allclose(base_delta.join(more)[NAME].dense(), 2 * wide.dense(), atol=1e-10)


def test_one_adapter_does_what_the_adapter_and_the_base_do() -> None:
    state, _ = _rounds(cast(MovesBase, FedExLoRA(FedExLoRA.Parameters())), 3, [0, 1])
    merged = base_delta.as_adapter(state.adapter, state.base)
    assert len({m.rank for m in merged.values()}) == 1
    assert same({p: m.scale * m.b @ m.a for p, m in merged.items()}, dense(state))
    assert all(isinstance(m, LoraModule) and m.conv1d == START[p].conv1d for p, m in merged.items())
    assert base_delta.as_adapter(START) == START
    assert FLoRA.Parameters().base_rank == 0


def test_racs_updates_stand_under_the_rounds_own_a() -> None:
    """What a robust rule compares is what the client trained, in the first round and after a skipped one too."""
    method = make("rac_lora")
    for last, round_ in ((0, 1), (1, 3)):
        used = fresh(START, method.seed, round_)
        payload = {n: t for n, t in to_tensors(adapter(1)).items() if n.endswith(B)}
        whole = completed(method, ClientUpdate(0, payload, 1.0), ServerState(START, round_ - 1))
        assert torch.equal(whole[NAME].a, used[NAME].a)
        after = method.server_step([ClientUpdate(0, payload, 1.0)], ServerState(START, last), RoundContext(round_))
        assert same(dense(after), {p: m.scale * m.b @ m.a for p, m in whole.items()})


def test_what_is_exact_is_exact_in_float32_too() -> None:
    clients = [{p: replace(m, a=m.a.float(), b=m.b.float()) for p, m in adapter(s).items()} for s in (1, 2, 3)]
    ideal = mean(
        [{p: replace(m, a=m.a.double(), b=m.b.double()) for p, m in c.items()} for c in clients], [1.0, 2.0, 3.0]
    )
    for name in ("flora", "fedex_lora", "fedmomentum", "fedask"):
        got = run(make(name), clients, [1.0, 2.0, 3.0])
        assert all((got[p].double() - ideal[p]).norm() < 3e-6 * ideal[p].norm() for p in ideal), name


def test_fed_sbs_probes_of_the_two_sides_are_drawn_apart() -> None:
    """On a square layer one stream would give the same numbers to both."""
    square = {"layer.q": LoraModule(torch.zeros(2, 6).double(), torch.zeros(6, 2).double(), 4.0)}
    probe = cast(FedSB, make("fed_sb"))._probe(square, 1)["layer.q"]
    assert not torch.isclose(probe.a, probe.b.T).any()
    assert torch.equal(probe.b, cast(FedSB, make("fed_sb"))._probe(square, 1)["layer.q"].b)
