"""What one reply may do to a model leaves it one that can be trained."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune import methods
from fedtune.config.schema import LoraSettings, TrainSettings
from fedtune.federation.reply import Reply
from fedtune.federation.screening import Expected, Most, screen
from fedtune.lora.state import to_tensors
from fedtune.methods import RoundContext, sound
from fedtune.methods.requests import Tensors, Train
from fedtune.methods.sound import GROWTH, Reach
from fedtune.models.adapted import AdaptedModel
from fedtune.models.adapter import attach
from fedtune.models.load import LoadedModel
from fedtune.models.proof import prove
from fedtune.models.whole import attach as attach_whole
from fedtune.objectives import Example
from fedtune.settings import load
from fedtune.training.executor import Sequential, Work, optimizer
from fedtune.types import Rejection
from tests import architectures

CASES = {
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "down_proj"),
}


@pytest.mark.parametrize("kind", CASES)
def test_training_from_a_mean_with_the_largest_reply_stays_finite(kind: str) -> None:
    """Every factor is as large as one of four clients can make it, in adapters of scale 16."""
    model = architectures.tiny(architectures.causal_configs()[kind], scale=0.1)
    model.requires_grad_(False)
    prove(model)
    lora = LoraSettings(r=4, alpha=64.0, target_modules=CASES[kind])
    adapted = attach(LoadedModel(model, None, "x", "y"), lora, 0)
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(t.shape, generator=generator) for n, t in to_tensors(adapted.layout).items()}
    start = {n: t * (GROWTH / 4) / t.norm() for n, t in drawn.items()}
    texts = [[Example.labelled(range(10 + k, 60 + k), 5) for k in range(2)]] * 3
    trained = Sequential(adapted).run(
        Work(Train(start, list(start)), texts, 5e-5, TrainSettings(max_grad_norm=1.0), 0, True)
    )
    assert all(bool(t.isfinite().all()) for t in trained.values())


def whole(dtype: torch.dtype = torch.float32, kind: str = "llama") -> AdaptedModel:
    """Return a small model whose weights are trained."""
    torch.manual_seed(0)
    model = architectures.tiny(architectures.causal_configs()[kind], scale=0.1).to(dtype)
    model.requires_grad_(False)
    prove(model)
    return attach_whole(LoadedModel(model, None, "x", "y"), "full")


STEPS, TEXTS = 4, [Example.labelled(range(10 + k, 40 + k), 5) for k in range(4)]


def trained(adapted: AdaptedModel, start: Tensors, train: TrainSettings, rate: float) -> tuple[Tensors, float]:
    """Return the weights after a client's round, and the loss of its first step."""
    seen: list[float] = []
    work = Work(
        Train(start, list(start)), [TEXTS] * STEPS, rate, train, 0, True, on_step=lambda _, loss: seen.append(loss)
    )
    return Sequential(adapted).run(work), seen[0]


def spiked(start: Tensors, trained: Tensors) -> dict[str, Tensor]:
    """Return each tensor's whole norm, and what the screening of norms adds to it, in one number."""
    found = {n: torch.zeros_like(t) for n, t in start.items()}
    for name, tensor in found.items():
        tensor.view(-1)[0] = float(start[name].norm()) + 0.99 * GROWTH
    return found


def wiped(start: Tensors, trained: Tensors) -> dict[str, Tensor]:
    """Return weights whose mean with three honest clients' is next to nothing."""
    return {n: -3 * t if float(t.norm()) < GROWTH / 2 else t for n, t in start.items()}


def backwards(start: Tensors, trained: Tensors) -> dict[str, Tensor]:
    """Return a change against all that was trained, larger than any that is accepted."""
    return {n: t + 0.1 * (t - trained[n]).sign() for n, t in start.items()}


ATTACKS = {"spike": spiked, "wipe": wiped, "backwards": backwards}
TRAINED = {
    "adamw": (torch.float32, TrainSettings(max_grad_norm=1.0), 1e-3),
    "adamw in bfloat16": (torch.bfloat16, TrainSettings(max_grad_norm=1.0), 1e-3),
    "sgd": (torch.float32, TrainSettings(optimizer="sgd", max_grad_norm=1.0), 1e-1),
}


def nearest(start: Tensors, wanted: Tensors, within: Reach) -> dict[str, Tensor]:
    """Return the reply nearest to a wanted one that is accepted."""
    found = {}
    for name, before in start.items():
        change, most = (wanted[name] - before).float(), 0.98 * within.most
        inside = change.clamp(-most, most) if within.order == math.inf else change * min(1, most / float(change.norm()))
        sent = (before.float() + inside).to(before.dtype)
        # rounded beyond it: the number stays
        found[name] = torch.where((sent - before).float().abs() > within.most, before, sent)
    return found


def losses(how: str, attack: str | None, rounds: int) -> tuple[list[float], list[Rejection]]:
    """Return the loss before each round, of four clients whose last one attacks in the first round, and who is refused.

    It sends what it wants; if that is refused, also the nearest that is accepted.
    """
    dtype, train, rate = TRAINED[how]
    adapted = whole(dtype)
    algorithm = methods.create(
        load([{"domain": "finance", "peft": {"kind": "full"}, "train": train.model_dump()}]).config
    )
    state, seen, refused = algorithm.initial(adapted.layout), list[float](), list[Rejection]()
    for round_ in range(1, rounds + 1):
        start = algorithm.view(state, 0)
        sent, loss = trained(adapted, start, train, rate)
        seen.append(loss)
        replies = [Reply(c, ("run", round_, c, 1), sent, {"examples": 4.0, "loss": loss}) for c in range(4)]
        expected = Expected(
            "run",
            round_,
            {c: algorithm.upload(state, c, round_, STEPS, rate) for c in range(4)},
            dict.fromkeys(range(4), 4),
            lambda client: Most(4, STEPS, 10_000),
        )
        if attack and round_ == 1:
            wanted = ATTACKS[attack](start, sent)
            refused += screen([*replies[:3], replace(replies[3], tensors=wanted)], expected).rejected
            replies[3] = replace(replies[3], tensors=nearest(start, wanted, sound.reach(train, rate, STEPS)))
        screened = screen(replies, expected)
        assert not screened.rejected
        state = algorithm.server_step(screened.updates, state, RoundContext(round_))
    return seen, refused


@pytest.mark.parametrize("how", TRAINED)
def test_one_reply_leaves_the_others_able_to_train_all_weights(how: str) -> None:
    honest, nobody = losses(how, None, 4)
    assert not nobody
    for attack in ATTACKS:
        seen, refused = losses(how, attack, 4)
        assert [(r.client, r.reason) for r in refused] == [(3, "values")]
        # one round is lost at most, and what it went back by
        assert seen[3] < seen[0], (attack, seen)
        assert seen[3] < honest[2] + (honest[0] - honest[1]), (attack, seen, honest)


HONEST = [
    (kind, dtype, TrainSettings(optimizer=optimizer, weight_decay=decay, max_grad_norm=1.0), rate)
    for kind, dtype in (("llama", torch.bfloat16), ("gpt2", torch.float32))
    for optimizer, rate in (("adamw", 1e-6), ("adamw", 1e-3), ("adamw", 0.1), ("sgd", 0.1), ("sgd", 3.0))
    for decay in (0.0, 0.1)
]


@pytest.mark.parametrize(("kind", "dtype", "train", "rate"), HONEST)
def test_no_honest_client_moves_a_weight_further_than_is_accepted(
    kind: str, dtype: torch.dtype, train: TrainSettings, rate: float
) -> None:
    adapted = whole(dtype, kind)
    start = to_tensors(adapted.layout)
    sent, _ = trained(adapted, start, train, rate)
    # smaller steps are lost between two numbers of 16 bits
    still = [n for n in start if n.endswith("proj.weight") and torch.equal(sent[n], start[n])]
    assert not still or rate < 1e-3
    within = sound.reach(train, rate, STEPS)
    assert not sound.change_problem(sent, start, within)
    if dtype == torch.float32:  # the margin is for what is rounded
        assert not sound.change_problem(sent, start, within._replace(most=0.5 * within.most))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_of_a_tensor_is_not_left_to_one_number(optimizer: str) -> None:
    """Decay takes a share of each number, so one near zero goes no further than gradients carry it."""
    train = TrainSettings(optimizer=optimizer, weight_decay=0.1, max_grad_norm=1.0)
    within = sound.reach(train, 0.1, STEPS)
    start = {"w": torch.linspace(0.0, 5.0, 1000)}
    assert not sound.change_problem({"w": start["w"] * (1 - within.share)}, start, within)
    spike = torch.zeros(1000)
    spike[0] = 0.98 * within.most
    assert not sound.change_problem({"w": start["w"] * (1 - within.share) + spike}, start, within)
    spike[0] = 1.02 * within.most
    assert "beyond what weight decay can" in sound.change_problem({"w": start["w"] + spike}, start, within)


def test_a_round_at_rate_0_moves_nothing() -> None:
    adapted = whole()
    start = to_tensors(adapted.layout)
    within = sound.reach(TrainSettings(), 0.0, STEPS)
    assert not sound.change_problem(trained(adapted, start, TrainSettings(), 0.0)[0], start, within)
    assert sound.change_problem({n: t + 1e-6 for n, t in start.items()}, start, within)


@settings(deadline=None, max_examples=100)
@given(
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([0.0, 0.5, 0.9, 0.999])),
    gradients=st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 0.5, -0.5, -1.0, 1.0]), min_size=1, max_size=12),
)
@example(betas=(0.9, 0.999), gradients=[1e-6, 1.0, 1.0, 1.0])
@example(betas=(0.9, 0.0), gradients=[1.0, 0.0])
def test_no_gradients_carry_adam_further_than_is_accepted(betas: tuple[float, float], gradients: list[float]) -> None:
    train = TrainSettings(adam_beta1=betas[0], adam_beta2=betas[1], max_grad_norm=1.0)
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    stepper = optimizer([([weight], 1e-3)], train)
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        stepper.step()
    within = sound.reach(train, 1e-3, len(gradients))
    assert abs(float(weight.detach())) <= within.most / sound.MARGIN * (1 + 1e-9)
