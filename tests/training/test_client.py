"""Local training against plain PyTorch and PEFT: padded, unpacked, every logit computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedtune import methods
from fedtune.config import Config, Settings
from fedtune.config.schema import ModelSettings
from fedtune.lora.state import to_tensors
from fedtune.models.adapter import AdaptedModel, attach
from fedtune.models.attention import packed_logits
from fedtune.models.load import load
from fedtune.models.packing import Span, pack, runs
from fedtune.objectives import Example
from fedtune.training import schedule
from fedtune.training.client import LocalWork
from fedtune.training.executor import Limits, Sequential, alone
from fedtune.training.loss import Part, joint_loss


def _example(seed: int, length: int, labels: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    shared = list(range(20, 32))
    tail = torch.randint(5, 500, (length,), generator=generator).tolist()
    return Example.labelled(shared + tail, len(shared) + length - labels)


@dataclass(frozen=True)
class Done:
    payload: Mapping[str, torch.Tensor]
    steps: int
    examples: int


def fit(
    adapted: AdaptedModel,
    shard: list[Example],
    start: Mapping[str, torch.Tensor],
    algorithm: methods.Algorithm,
    config: Config,
    client: int,
    round_: int,
    limits: Limits | None = None,
) -> Done:
    """One client's work of one round, as the ClientApp does it."""
    executor = Sequential(adapted, limits)
    local = LocalWork(adapted, shard, adapted.layout, {}, config, (client, round_, 1), tokens=executor.limits.tokens)
    fitted = alone(local.run(algorithm.work(local.context, start)), executor)
    return Done(fitted.payload, len(local.losses_seen), local.examples)


SHARD = [_example(i, 4 + i % 7, 1 + i % 3) for i in range(17)]


def _adapted(config: Config, **changes: Any) -> AdaptedModel:
    base = load(ModelSettings(name=config.model.name))
    return attach(base, config.lora.model_copy(update=changes), seed=3)


@pytest.fixture(scope="module")
def config(settings: Callable[..., Settings]) -> Config:
    return settings(train={"max_steps": 4, "per_device_train_batch_size": 5, "learning_rate_max": 1e-2}).config


def _padded_loss(model: Any, examples: list[Example]) -> torch.Tensor:
    """The stock way: one padded batch, all logits, ignored labels."""
    texts = [text for example in examples for text in example.texts]
    longest = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), longest), 2)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        mask[row, : len(text.ids)] = 1
        for start, end in text.spans:
            labels[row, start:end] = torch.tensor(text.ids[start:end])
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum")


def _gradients(adapted: AdaptedModel, loss: torch.Tensor) -> torch.Tensor:
    adapted.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in adapted.slots.values() if p.grad is not None])


@pytest.mark.parametrize("share", [False, True])
def test_packed_response_only_loss_and_gradients_are_the_padded_full_ones(config: Config, share: bool) -> None:
    adapted = _adapted(config)
    for slot in adapted.slots.values():
        torch.nn.init.normal_(slot, std=0.1)
    packed, _ = joint_loss(adapted.model, [Part(SHARD)], share_prefix=share)
    padded = _padded_loss(adapted.model, SHARD)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-5)
    one, two = _gradients(adapted, packed), _gradients(adapted, padded)
    assert torch.norm(one - two) / torch.norm(two) < 1e-5


def test_no_text_sees_its_neighbour(config: Config) -> None:
    adapted = _adapted(config)
    texts = [example.texts[0].ids for example in SHARD[:3]]
    keep = list(range(len(texts[0])))
    with torch.no_grad():
        one = packed_logits(adapted.model, texts, keep)
        two = packed_logits(adapted.model, [texts[0], tuple(reversed(texts[1])), texts[2]], keep)
    assert torch.equal(one, two)


def test_a_shared_prefix_is_laid_out_once() -> None:
    row = pack([[1] * 9 + [2, 3], [1] * 9 + [4], [1] * 9 + [5, 6, 7]], share_prefix=True)
    assert row.ids == [1] * 9 + [2, 3, 4, 5, 6, 7]
    assert row.positions == [*range(9), 9, 10, 9, 9, 10, 11]
    assert row.spans == (Span(0, 9), Span(9, 11, (0, 9)), Span(11, 12, (0, 9)), Span(12, 15, (0, 9)))
    assert [row.ids[i] for i in row.place] == [1] * 9 + [2, 3] + [1] * 9 + [4] + [1] * 9 + [5, 6, 7]
    assert pack([[1, 2], [1, 2]], share_prefix=True).spans == (Span(0, 2), Span(2, 4))
    assert pack([[1] * 20], share_prefix=True).spans == (Span(0, 20),)


def test_micro_batches_keep_order_and_limit() -> None:
    found = list(runs(SHARD, lambda e: e.tokens, 60))
    assert [e for run in found for e in run] == SHARD
    assert all(sum(e.tokens for e in run) <= 60 or len(run) == 1 for run in found)


def _stock_training(config: Config, adapted: AdaptedModel, round_: int) -> dict[str, torch.Tensor]:
    """Ten lines of plain PyTorch: what `fit` has to equal."""
    params = list(adapted.slots.values())
    rate = schedule.learning_rate(config.train, round_, config.federation.rounds)
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=0.0)
    for rows in schedule.batches(config.train, len(SHARD), config.seed, 1, round_):
        examples = [SHARD[i] for i in rows]
        optimizer.zero_grad()
        (_padded_loss(adapted.model, examples) / sum(e.labels for e in examples)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params, config.train.max_grad_norm)
        optimizer.step()
    return {n: p.detach().clone() for n, p in adapted.slots.items()}


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}, {"target_modules": ("all-linear",)}])
@pytest.mark.parametrize("limit", [4096, 64])
def test_fit_is_stock_peft_training(config: Config, kind: dict[str, Any], limit: int) -> None:
    adapted = _adapted(config, **kind)
    start = to_tensors(adapted.state())
    want = _stock_training(config, adapted, 2)
    result = fit(adapted, SHARD, start, methods.create(config), config, 1, 2, Limits(limit))
    moved = torch.cat([(want[n] - start[n]).flatten() for n in want]).norm()
    assert moved > 0.01
    for name, tensor in want.items():
        assert torch.allclose(result.payload[name], tensor, atol=2e-4), name
    assert (result.steps, result.examples) == (
        4,
        len({i for r in schedule.batches(config.train, 17, 42, 1, 2) for i in r}),
    )


def test_fit_depends_on_client_and_round_only(config: Config) -> None:
    adapted = _adapted(config, dropout=0.2)
    noisy = config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.2})})
    start, method = to_tensors(adapted.state()), methods.create(config)
    first = fit(adapted, SHARD, start, method, noisy, 1, 1).payload
    fit(adapted, SHARD[:4], start, method, noisy, 2, 5)
    torch.manual_seed(12345)
    again = fit(adapted, SHARD, start, method, noisy, 1, 1).payload
    other = fit(adapted, SHARD, start, method, noisy, 1, 2).payload
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_checkpointing_changes_nothing(config: Config) -> None:
    adapted = _adapted(config)
    start, method = to_tensors(adapted.state()), methods.create(config)
    one = fit(adapted, SHARD, start, method, config, 0, 1).payload
    two = fit(adapted, SHARD, start, method, config, 0, 1, Limits(checkpointing=True)).payload
    assert all(torch.allclose(one[n], two[n], atol=1e-6) for n in one)


def test_fedprox_stays_nearer_and_mu_is_felt(settings: Callable[..., Settings], config: Config) -> None:
    adapted = _adapted(config)
    start = to_tensors(adapted.state())
    distances = []
    for mu in (1e-6, 50.0):
        prox = settings(drift={"proximal_mu": mu}, train=config.train.model_dump()).config
        payload = fit(adapted, SHARD, start, methods.create(prox), prox, 1, 1).payload
        distances.append(sum((payload[n] - start[n]).square().sum().item() for n in start))
    assert distances[1] < 0.9 * distances[0]


def test_the_base_model_is_never_changed(config: Config) -> None:
    adapted = _adapted(config)
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if "lora" not in n}
    fit(adapted, SHARD, to_tensors(adapted.state()), methods.create(config), config, 0, 1)
    assert all(torch.equal(p, before[n]) for n, p in adapted.model.named_parameters() if n in before)
