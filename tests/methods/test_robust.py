"""What robust rules promise holds of the global model, for every method that takes one; the others refuse by name."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import Config
from fedtune.lora.base_delta import effective
from fedtune.lora.state import A, AdapterState, B, LoraModule, to_tensors, with_rank
from fedtune.methods import METHODS, Algorithm, ClientUpdate, RoundContext, ServerState, create, problems
from fedtune.methods.traits import by_product
from fedtune.methods.wrappers import rules
from fedtune.types import RunFailedError, UpdateError

SOUND = [name for name in METHODS if by_product(METHODS[name])]
MIXED = [name for name in SOUND if METHODS[name].mixed_ranks]
BOUNDING = ["krum", "multi-krum", "geometric-median", "trimmed", "dnc"]  # foolsgold is after clients that are alike
CLIPS: list[dict[str, Any]] = [
    {"clip_norm": "median"},
    {"clip_norm": 1.0},
    {"rule": "foolsgold", "clip_norm": "median"},
]
CHOICES: list[dict[str, Any]] = [{"rule": rule} for rule in BOUNDING] + CLIPS
# FLoRIST drops a share of the energy even where nothing is attacked
WHOLE = {"florist": {"tau": 1 - 1e-12}}
CLIENTS = 5


def config(name: str, chosen: dict[str, Any], **more: Any) -> Config:
    tree = {
        "domain": "finance",
        "federation": {"clients": CLIENTS},
        "lora": {"r": 4, "alpha": 8.0},
        "method": {"name": name, **WHOLE.get(name, {})},
        "robust": chosen,
    }
    return Config.model_validate({**tree, **more})


def adapter(seed: int, dtype: torch.dtype = torch.float32) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {f"l{i}.q": LoraModule(draw(4, 12), draw(9, 4), 8.0) for i in range(2)}


def started(made: Algorithm, dtype: torch.dtype = torch.float32) -> ServerState:
    """Return a state in the middle of a run: of methods that move the base, a fresh adapter."""
    state = made.initial(adapter(0, dtype))
    first = [ClientUpdate(c, _trained(made, state, c, 1), 10.0) for c in range(CLIENTS)]
    return create(config(made.method.name, {})).server_step(first, state, RoundContext(1))


def _trained(made: Algorithm, state: ServerState, client: int, round_: int, step: float = 0.05) -> dict[str, Tensor]:
    """Return what an honest client sends: what it was sent, and a step away from it."""
    generator = torch.Generator().manual_seed(1000 * round_ + client)
    sent = made.method.upload(state, client, round_).tensors
    return {n: t + step * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in sent.items()}


def model(state: ServerState) -> Tensor:
    """Return the whole change of the base model as one vector."""
    whole = effective(state.adapter, state.base)
    return torch.cat([(w.left.double() @ w.right.double()).flatten() for w in whole.values()])


def alone(made: Algorithm, state: ServerState, update: ClientUpdate, round_: int) -> Tensor:
    """Return the model that one client's update is."""
    plain = create(config(made.method.name, {}))
    return model(plain.server_step([update], state, RoundContext(round_)))


def stepped(made: Algorithm, sent: list[ClientUpdate], state: ServerState, round_: int) -> ServerState:
    """Make a round as the loop does: who is named by an error is left out, and with too few nothing happens."""
    try:
        return made.server_step(sent, state, RoundContext(round_))
    except UpdateError as err:
        return stepped(made, [u for u in sent if u.client != err.client], state, round_)
    except RunFailedError:
        return state


def gauge(tensors: dict[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    """Return the same products in an ill-conditioned gauge, as well as float32 holds it."""
    generator = torch.Generator().manual_seed(seed)
    changed = dict(tensors)
    for name in tensors:
        if name.endswith(A) and name.replace(A, B) in tensors:
            rank = tensors[name].shape[0]
            turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0]
            scale = torch.logspace(0, 1, rank, base=size, dtype=torch.float64)
            mixed = turn * scale
            changed[name] = torch.linalg.solve(mixed, tensors[name].double()).float()
            changed[name.replace(A, B)] = (tensors[name.replace(A, B)].double() @ mixed).float()
    return changed


ATTACKS = ["gauge", "boost", "sign-flip", "fill", "one number", "noise", "hidden"]
SIZES = [1e-6, 1e-3, 10.0, 300.0, 1e3, 1e4, 1e5, 1e8, 1e20, 3e38]


def attacked(
    kind: str, size: float, honest: dict[str, Tensor], sent: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    if kind == "gauge":
        return gauge(honest, size, seed)
    if kind in ("boost", "sign-flip"):
        sign = 1 if kind == "boost" else -1
        return {n: (sent[n] + sign * size * (t - sent[n])).clamp(-3e38, 3e38) for n, t in honest.items()}
    if kind == "fill":
        return {n: torch.full_like(t, size) for n, t in honest.items()}
    if kind == "one number":
        name = sorted(honest)[seed % len(honest)]
        changed = honest[name].clone()
        changed.view(-1)[seed % changed.numel()] = size
        return {**honest, name: changed}
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        limit = 3e38
        return {n: (torch.randn(t.shape, generator=generator) * size).clamp(-limit, limit) for n, t in honest.items()}
    changed = dict(honest)  # a large row of A hidden behind a column of B that is zero
    for name in honest:
        if name.endswith(A):
            changed[name] = changed[name].clone()
            changed[name][0] = size
        if name.endswith(B):
            changed[name] = changed[name].clone()
            changed[name][:, 0] = 0
    return changed


@pytest.mark.parametrize("name", SOUND)
@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(CHOICES),
    st.sampled_from(ATTACKS),
    st.sampled_from(SIZES),
    st.integers(0, CLIENTS - 1),
    st.integers(0, 99),
    st.sampled_from([1.0, 10.0, 1e6]),
)
def test_one_of_five_clients_cannot_move_the_model_beyond_what_the_rule_promises(
    name: str, chosen: dict[str, Any], kind: str, size: float, bad: int, seed: int, claimed: float
) -> None:
    made = create(config(name, chosen))
    assert not list(problems(made.config))
    state = started(made)
    sent = made.method.upload(state, bad, 2).tensors
    updates = [ClientUpdate(c, _trained(made, state, c, 2), 10.0) for c in range(CLIENTS)]
    honest = torch.stack([alone(made, state, u, 2) for u in updates if u.client != bad])
    lie = attacked(kind, size, dict(updates[bad].tensors), sent, seed)
    updates[bad] = ClientUpdate(bad, lie, claimed if "rule" in chosen else 10.0)
    after = stepped(made, updates, state, 2)
    got, centre = model(after), honest.mean(0)
    # krum: 2 distances of honest clients; the median's breakdown bound at one in five: 2.7; a cut in rank: one more
    spread = float(torch.cdist(honest, torch.cat([honest, model(state)[None]])).max())
    assert torch.isfinite(got).all()
    assert float((got - centre).norm()) < 6 * spread
    usual = max(float(t.abs().max()) for t in to_tensors(state.adapter).values())
    assert max(float(t.abs().max()) for t in to_tensors(after.adapter).values()) < 10 * usual


def test_without_a_rule_the_same_attacks_do_move_the_model() -> None:
    made = create(config("flexlora", {}))
    state = started(made)
    updates = [ClientUpdate(c, _trained(made, state, c, 2), 10.0) for c in range(CLIENTS)]
    want = model(made.server_step(updates, state, RoundContext(2)))
    for kind, size in (("boost", 300.0), ("noise", 10.0), ("fill", 10.0)):
        sent = made.method.upload(state, 2, 2).tensors
        bad = replace(updates[2], tensors=attacked(kind, size, dict(updates[2].tensors), sent, 1))
        got = model(stepped(made, [*updates[:2], bad, *updates[3:]], state, 2))
        assert float((got - want).norm()) > 5 * float(want.norm()), kind


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chosen", [{"rule": rule} for rule in rules.RULES] + CLIPS[:2], ids=str)
def test_a_method_takes_every_rule_or_refuses_it_with_those_that_do(name: str, chosen: dict[str, Any]) -> None:
    said = [p for p in problems(config(name, chosen)) if p.where == "robust"]
    if name in SOUND:
        assert not said
    else:
        assert len(said) == 1
        assert name in said[0].what
        assert all(sound in said[0].fix for sound in SOUND)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora": {"dora": True}}, "not DoRA's magnitudes"),
        ({"drift": {"scaffold": True}, "train": {"optimizer": "sgd"}}, "SCAFFOLD's control variates"),
        (
            {"federation": {"clients": 4}},
            'robust.rule = "krum" with malicious = 1 needs 5 updates per round, and 4 are',
        ),
        ({"federation": {"clients": 50, "fraction": 0.08}}, "and 4 are asked"),
        ({"robust": {"rule": "trimmed", "malicious": 3}}, "needs 7 updates per round, and 5 are asked"),
        ({"robust": {"rule": "multi-krum", "malicious": 9}}, "needs 21 updates"),
        ({"robust": {"clip_norm": "median", "malicious": 3}}, 'robust.clip_norm = "median" with malicious = 3 needs 7'),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_rule_that_could_not_hold_is_refused(change: dict[str, Any], said: str) -> None:
    made = config("ffa_lora", {"rule": "krum"}, **change)
    assert any(said in str(p) for p in problems(made)), [str(p) for p in problems(made)]


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_too_few_updates_are_an_error_and_never_a_weaker_rule(chosen: dict[str, Any]) -> None:
    made = create(config("flexlora", chosen))
    state = made.initial(adapter(0))
    fewest = rules.fewest(made.config.robust)
    updates = [ClientUpdate(c, _trained(made, state, c, 1), 10.0) for c in range(fewest)]
    made.server_step(updates, state, RoundContext(1))
    if fewest > 1:
        with pytest.raises(RunFailedError, match=f"needs {fewest} updates per round; {fewest - 1} came"):
            made.server_step(updates[1:], state, RoundContext(1))


@pytest.mark.parametrize("rule", rules.RULES)
def test_a_rule_counts_clients_and_not_the_examples_that_they_claim(rule: str) -> None:
    made = create(config("flexlora", {"rule": rule}))
    state = started(made)
    updates = [ClientUpdate(c, _trained(made, state, c, 2), 10.0) for c in range(CLIENTS)]
    claiming = [replace(u, examples=10.0 ** (3 * u.client)) for u in updates]
    assert torch.equal(
        model(made.server_step(updates, state, RoundContext(2))),
        model(made.server_step(claiming, state, RoundContext(2))),
    )


@pytest.mark.parametrize(("rule", "least"), [("krum", 3), ("multi-krum", 3), ("trimmed", 1), ("geometric-median", 1)])
def test_a_refused_reply_is_one_of_the_malicious_where_the_others_are_too_few(rule: str, least: int) -> None:
    def left(updates: int, refused: int, malicious: int = 2) -> int:
        chosen = config("flexlora", {"rule": rule, "malicious": malicious}).robust
        return rules.remaining(chosen, updates, refused).malicious

    enough = least + 4
    assert left(enough, 0) == left(enough, 1) == left(enough, 9) == 2
    assert left(enough - 1, 1) == left(enough - 2, 1) == left(enough - 1, 2) == 1
    assert left(enough - 3, 2) == left(enough - 3, 9) == 0
    assert left(enough - 1, 0) == left(0, 0) == 2
    assert (left(enough - 3, 1), left(0, 1)) == (1, 1)  # one too few for what may be left: still too few


def test_a_rule_names_whom_it_leaves_out() -> None:
    made = create(config("flexlora", {"rule": "trimmed"}))
    state = started(made)
    updates = [ClientUpdate(c, _trained(made, state, c, 2, 3.0 if c == 3 else 0.05), 10.0) for c in range(CLIENTS)]
    notes: list[str] = []
    made.server_step(updates, state, RoundContext(2, note=notes.append))
    assert notes == ['robust.rule = "trimmed" gave no weight to the updates of clients 3']


RANKS = sorted(set(itertools.permutations([1, 2, 4, 4, 3])))


@pytest.mark.parametrize("name", SOUND)
@settings(deadline=None, max_examples=15)
@given(st.sampled_from(RANKS), st.sampled_from([1e-9, 1e-12]))
def test_a_clip_at_next_to_nothing_leaves_the_model(name: str, ranks: tuple[int, ...], limit: float) -> None:
    """Whatever ranks clients have, and in whatever order: what is clipped off counts for the whole global model."""
    made = create(config(name, {"clip_norm": limit}, **_lora(name, ranks)))
    state = started(made, torch.float64)
    after = made.server_step(_far(made, state, ranks), state, RoundContext(2))
    assert float((model(after) - model(state)).norm()) < 1e-6 * float(model(state).norm())


@pytest.mark.parametrize("name", SOUND)
@settings(deadline=None, max_examples=15)
@given(st.sampled_from(RANKS))
def test_a_clip_above_all_norms_is_none(name: str, ranks: tuple[int, ...]) -> None:
    clipped = create(config(name, {"clip_norm": 1e12}, **_lora(name, ranks)))
    plain = create(config(name, {}, **_lora(name, ranks)))
    state = started(plain, torch.float64)
    sent = _far(plain, state, ranks)
    one, two = (
        model(clipped.server_step(sent, state, RoundContext(2))),
        model(plain.server_step(sent, state, RoundContext(2))),
    )
    assert float((one - two).norm()) < 1e-9 * float(two.norm())


def _lora(name: str, ranks: tuple[int, ...]) -> dict[str, Any]:
    return {"lora": {"r": 4, "alpha": 8.0, "ranks": ranks if name in MIXED else ()}}


def _far(made: Algorithm, state: ServerState, ranks: tuple[int, ...]) -> list[ClientUpdate]:
    """Return updates that claim to be somewhere else altogether."""
    return [ClientUpdate(c, _trained(made, state, c, 2, 3.0), 10.0) for c in range(len(ranks))]


def test_a_client_of_a_small_rank_is_measured_against_the_whole_model() -> None:
    """Its adapter has not what the others' further ranks hold, and that is a change of the model as any other."""
    made = create(config("flexlora", {"clip_norm": 1e-9}, lora={"r": 4, "alpha": 8.0, "ranks": [1, 4, 4, 4, 4]}))
    state = ServerState(adapter(0, torch.float64), 1)
    cut = {p: with_rank(m, 1) for p, m in state.adapter.items()}
    sent = [ClientUpdate(0, to_tensors(cut), 10.0)]
    assert float((model(made.server_step(sent, state, RoundContext(2))) - model(state)).norm()) < 1e-6


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_what_cancels_in_an_update_reaches_neither_the_rule_nor_the_model(name: str, chosen: dict[str, Any]) -> None:
    """Two components of 1e12 whose sum is exactly nothing, beside an honest product of a smaller rank."""
    made = create(config(name, chosen))
    state = made.initial(adapter(0))
    updates = []
    for client in range(CLIENTS):
        tensors = _trained(made, state, client, 1)
        for tensor in (t for n, t in tensors.items() if n.endswith(B)):
            tensor[:, :2] = 0
        updates.append(ClientUpdate(client, tensors, 10.0))
    honest = torch.stack([alone(made, state, u, 1) for u in updates])
    for tensor_name, tensor in updates[3].tensors.items():
        if tensor_name.endswith(B):
            tensor[:, :2] = 1e6 * torch.randn(9, 1, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
        else:
            tensor[:1] = 1e6 * torch.randn(12, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
            tensor[1] = -tensor[0]
    got = model(made.server_step(updates, state, RoundContext(1)))
    spread = float(torch.cdist(honest, torch.cat([honest, model(state)[None]])).max())
    assert float((got - honest.mean(0)).norm()) < 6 * spread
