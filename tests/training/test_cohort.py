"""Several clients at once give each client what it gets alone, to rounding: the gates a speed-up has to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune import methods
from fedtune.config import Config, Settings
from fedtune.config.schema import ModelSettings
from fedtune.lora.state import to_tensors
from fedtune.methods.requests import Program, Tensors, Train
from fedtune.models.adapter import AdaptedModel, attach
from fedtune.models.load import load
from fedtune.objectives import Example
from fedtune.training.client import LocalWork
from fedtune.training.cohort import Cohort
from fedtune.training.executor import Executor, Limits, Sequential
from fedtune.training.scheduler import together
from tests.training.programs import all_asked, asking

Shards = list[list[Example]]


def example(seed: int, length: int, labels: int) -> Example:
    """A text that begins like the others and goes on by itself."""
    drawn = torch.randint(5, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example.labelled([*range(20, 32), *drawn], 12 + length - labels)


def shards(clients: int) -> Shards:
    """Ragged: every client has other lengths, and another number of labels."""
    return [[example(97 * c + i, 3 + (5 * c + i) % 9, 1 + (c + i) % 3) for i in range(11 + c)] for c in range(clients)]


@pytest.fixture(scope="module")
def build(settings: Callable[..., Settings]) -> Callable[..., tuple[AdaptedModel, Config]]:
    def made(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[AdaptedModel, Config]:
        defaults = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate_max": 5e-3}
        train = {**defaults, "max_grad_norm": 0.5, **changes.pop("train", {})}
        config = settings(train=train, **changes).config
        base = load(ModelSettings(name=config.model.name))
        base.model.to(dtype)
        adapted = attach(base, config.lora, seed=3)
        if dtype == torch.float64:
            for slot in adapted.slots.values():
                slot.data = slot.data.double()
        return adapted, config

    return made


def started(adapted: AdaptedModel, dtype: torch.dtype = torch.float64, seed: int = 5) -> dict[str, Tensor]:
    """An adapter whose B is not zero, so that A has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    like = to_tensors(adapted.layout)
    return {
        n: (0.1 * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(dtype) for n, t in like.items()
    }


def trained(
    adapted: AdaptedModel,
    config: Config,
    executor: Executor,
    starts: Sequence[Tensors],
    data: Shards,
    clients: Sequence[int] | None = None,
    losses: list[float] | None = None,
) -> list[dict[str, Tensor]]:
    """Local training of some clients, as the executor does it."""
    chosen = list(range(len(starts))) if clients is None else list(clients)

    works = [LocalWork(adapted, data[c], adapted.layout, {}, config, (c, 1, 1)) for c in chosen]
    done = all_asked(works, [Train(starts[c], list(starts[c])) for c in chosen], executor)
    if losses is not None:
        losses += [work.loss for work in works]
    return done


def distance(one: Tensors, two: Tensors) -> float:
    """Relative L2 distance of two adapters."""
    a, b = (torch.cat([t[n].double().flatten() for n in one]) for t in (one, two))
    return float(torch.norm(a - b) / torch.norm(b))


@pytest.mark.parametrize("dropout", [0.0, 0.075])
def test_float64_cohort_is_one_client_at_a_time(build: Any, dropout: float) -> None:
    adapted, config = build(lora__dropout=dropout)
    starts, data = [started(adapted)] * 4, shards(4)
    cohort, alone_losses, losses = Cohort(adapted, 4), [], []
    alone = trained(adapted, config, Sequential(adapted), starts, data, losses=alone_losses)
    stacked = trained(adapted, config, cohort, starts, data, losses=losses)
    assert cohort.stacked == 4
    assert max(map(distance, stacked, alone)) < 1e-12
    assert losses == pytest.approx(alone_losses, rel=1e-12)
    assert min(distance(t, starts[0]) for t in stacked) > 1e-2


def test_float32_cohort_is_one_client_at_a_time(build: Any) -> None:
    adapted, config = build(torch.float32, lora__dropout=0.075)
    starts, data, alone_losses, losses = [started(adapted, torch.float32)] * 4, shards(4), [], []
    alone = trained(adapted, config, Sequential(adapted), starts, data, losses=alone_losses)
    stacked = trained(adapted, config, Cohort(adapted, 4), starts, data, losses=losses)
    assert max(map(distance, stacked, alone)) < 1e-4
    assert losses == pytest.approx(alone_losses, rel=1e-5)


def test_bfloat16_cohort_is_nearer_to_one_at_a_time_than_that_is_to_float32(build: Any) -> None:
    """The adapter and the optimiser stay in float32; only the base computes in 16 bits."""
    half, config = build(torch.bfloat16)
    wide, _ = build(torch.float32)
    starts, data = [started(half, torch.float32)] * 4, shards(4)
    alone = trained(half, config, Sequential(half), starts, data)
    stacked = trained(half, config, Cohort(half, 4), starts, data)
    exact = trained(wide, config, Sequential(wide), starts, data)
    assert {t.dtype for t in stacked[0].values()} == {torch.float32}
    near, far = (sum(map(distance, one, alone)) for one in (stacked, exact))
    assert near <= 0.7 * far


def test_grouping_and_order_do_not_matter(build: Any) -> None:
    adapted, config = build(lora__dropout=0.075)
    starts, data = [started(adapted)] * 5, shards(5)
    whole = trained(adapted, config, Cohort(adapted, 5), starts, data)
    for size, order in ((2, [0, 1, 2, 3, 4]), (3, [4, 2, 0, 1, 3]), (5, [3, 1, 4, 0, 2])):
        other = trained(adapted, config, Cohort(adapted, size), starts, data, clients=order)
        assert max(distance(other[i], whole[c]) for i, c in enumerate(order)) < 1e-12
    again = trained(adapted, config, Cohort(adapted, 5), starts, data)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(again, whole, strict=True) for n in a)


def test_a_client_sees_nothing_of_another(build: Any) -> None:
    """Another client's data changes; nobody else's update does, not by one bit."""
    adapted, config = build(train={"max_steps": 3})
    starts, data = [started(adapted)] * 3, shards(3)
    # other tokens, of which as many are shared: in a row of another length products round otherwise
    other = [Example.labelled([(i + 1) % 480 for i in e.texts[0].ids], e.texts[0].start) for e in data[1]]
    changed = [data[0], other, data[2]]
    before = trained(adapted, config, Cohort(adapted, 3), starts, data)
    after = trained(adapted, config, Cohort(adapted, 3), starts, changed)
    assert all(torch.equal(before[c][n], after[c][n]) for c in (0, 2) for n in before[c])
    assert distance(before[1], after[1]) > 1e-3


def test_mixed_ranks_rates_and_optimisers(build: Any) -> None:
    adapted, config = build(train={"max_steps": 4})
    ranks, rates = (4, 2, 3), ("adamw", "sgd", "adamw")
    data, full = shards(3), started(adapted)
    starts = [{n: (t[:r] if ".lora_A" in n else t[:, :r]).clone() for n, t in full.items()} for r in ranks]

    def run(executor: Executor) -> list[dict[str, Tensor]]:
        def work(client: int) -> LocalWork:
            train = config.train.model_copy(
                update={"optimizer": rates[client], "learning_rate_max": 1e-3 * (1 + client)}
            )
            own = config.model_copy(update={"train": train})
            return LocalWork(adapted, data[client], adapted.layout, {}, own, (client, 1, 1))

        return all_asked([work(c) for c in range(3)], [Train(start, list(start)) for start in starts], executor)

    cohort = Cohort(adapted, 3)
    alone, stacked = run(Sequential(adapted)), run(cohort)
    assert cohort.stacked == 3
    assert [t[next(iter(t))].shape[0] for t in stacked] == list(ranks)
    assert max(map(distance, stacked, alone)) < 1e-12


def test_clients_with_fewer_steps_are_done_earlier(build: Any) -> None:
    """As in a sweep over domains, whose clients make different numbers of steps."""
    adapted, config = build(lora__dropout=0.075)
    starts, data, counts = [started(adapted)] * 3, shards(3), (4, 1, 6)

    def run(executor: Executor) -> tuple[list[dict[str, Tensor]], list[int]]:
        def work(client: int) -> LocalWork:
            own = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": counts[client]})})
            return LocalWork(adapted, data[client], adapted.layout, {}, own, (client, 1, 1))

        works = [work(client) for client in range(3)]
        done = all_asked(works, [Train(start, list(start)) for start in starts], executor)
        return done, [len(work.losses_seen) for work in works]

    cohort = Cohort(adapted, 3)
    (alone, steps), (stacked, same) = run(Sequential(adapted)), run(cohort)
    assert cohort.stacked == 3
    assert steps == same == list(counts)
    assert max(map(distance, stacked, alone)) < 1e-12


def test_small_passes_and_recomputed_activations_change_nothing(build: Any) -> None:
    adapted, config = build(train={"max_steps": 3}, lora__dropout=0.075)
    starts, data = [started(adapted)] * 3, shards(3)
    whole = trained(adapted, config, Cohort(adapted, 3), starts, data)
    for limits in (Limits(64), Limits(checkpointing=True)):
        for executor in (Cohort(adapted, 3, limits), Sequential(adapted, limits)):
            assert max(map(distance, trained(adapted, config, executor, starts, data), whole)) < 1e-12, limits


@pytest.mark.parametrize("name", [n for n, kind in methods.METHODS.items() if n != "fedkseed"])
def test_every_method_fits_the_same_in_a_cohort(build: Any, name: str) -> None:
    """What cannot be stacked (cores, second adapters, routers) is trained one after the other, unasked."""
    adapted, config = build(torch.float32, train={"max_steps": 2}, method__name=name, federation__clients=3)
    algorithm, data = methods.create(config), shards(3)
    state = algorithm.initial(adapted.layout)

    def fit(round_: int, client: int) -> Any:
        layout = algorithm.method.cut(adapted.layout, client)
        local = LocalWork(adapted, data[client], layout, {}, config, (client, round_, 1))
        return local.run(algorithm.work(local.context, algorithm.view(state, client)))

    for round_ in (1, 2):
        results = []
        for executor in (Sequential(adapted), Cohort(adapted, 3)):
            done = together([fit(round_, c) for c in range(3)], executor.run_all)
            results.append([outcome.result() for outcome in done])
        for one, two in zip(*results, strict=True):
            assert one.payload.keys() == two.payload.keys()
            assert distance(one.payload, two.payload) < 1e-4
            assert one.kept.keys() == two.kept.keys()


def test_a_client_that_fails_fails_alone(build: Any) -> None:
    adapted, config = build(train={"max_steps": 2})
    starts, data = [started(adapted)] * 3, shards(3)
    cohort = Cohort(adapted, 3)

    def program(client: int) -> Program[Any]:
        if client == 1:
            raise ValueError("its own fault")
        return (yield Train(starts[client], list(starts[client])))

    works = [LocalWork(adapted, data[c], adapted.layout, {}, config, (c, 1, 1)) for c in range(3)]
    done = together([work.run(program(c)) for c, work in enumerate(works)], cohort.run_all)
    with pytest.raises(ValueError, match="its own fault"):
        done[1].result()
    assert cohort.stacked == 2
    assert trained(adapted, config, cohort, starts, data)[0].keys() == done[0].result().keys()


def test_a_pass_that_fails_is_tried_by_halves_until_the_culprit_is_alone(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for two clients a pass only, and one client that fails whoever is with it."""
    adapted, config = build(train={"max_steps": 2})
    starts, data = [started(adapted, seed=c) for c in range(5)], shards(5)
    plain = trained(adapted, config, Sequential(adapted), starts, data)
    cohort = Cohort(adapted, 5)
    sizes: list[int] = []
    stacked, alone = cohort._stacked, cohort._one.run

    def tight(works: Any) -> Any:
        sizes.append(len(works))
        if len(works) > 2:
            for work in works:
                work.on_step(work.steps[0], 99.0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(torch.equal(next(iter(w.asked.start.values())), next(iter(starts[3].values()))) for w in works):
            raise ValueError("odd tensors")
        return stacked(works)

    def odd(work: Any) -> Any:
        if torch.equal(next(iter(work.asked.start.values())), next(iter(starts[3].values()))):
            raise ValueError("odd tensors")
        return alone(work)

    monkeypatch.setattr(cohort, "_stacked", tight)
    monkeypatch.setattr(cohort._one, "run", odd)
    locals_ = [LocalWork(adapted, data[c], adapted.layout, {}, config, (c, 1, 1)) for c in range(5)]
    jobs = [work.run(asking(Train(s, list(s)))) for work, s in zip(locals_, starts, strict=True)]
    done = together(jobs, cohort.run_all)
    assert sizes == [5, 2, 3, 2]
    assert str(done[3].error) == "odd tensors"
    for client in (0, 1, 2, 4):
        assert distance(done[client].result(), plain[client]) < 1e-12
        assert len(locals_[client].losses_seen) == 2, "an attempt that failed counts for nothing"
        assert 99.0 not in locals_[client].losses_seen


def test_masked_entries_stay_bit_for_bit_in_a_cohort_as_alone(build: Any) -> None:
    """Under weight decay too, which moves what has no gradient."""
    adapted, config = build(train={"weight_decay": 0.1})
    begun, data = started(adapted), shards(3)
    names = [n for n in begun if "lora_B" in n]
    masks = {n: torch.zeros_like(begun[n]).index_fill_(1, torch.tensor([1]), 1.0) for n in names}

    def done(executor: Executor) -> list[dict[str, Tensor]]:
        works = [LocalWork(adapted, data[c], adapted.layout, {}, config, (c, 1, 1)) for c in range(3)]
        return all_asked(works, [Train(begun, names, masks=masks)] * 3, executor)

    cohort = Cohort(adapted, 3)
    alone, stacked = done(Sequential(adapted)), done(cohort)
    assert cohort.stacked == 3
    assert max(map(distance, stacked, alone)) < 1e-12
    for made in (*alone, *stacked):
        for name in names:
            frozen = masks[name] == 0
            assert torch.equal(made[name][frozen], begun[name][frozen])
            assert not (made[name][~frozen] == begun[name][~frozen]).any()


@pytest.mark.parametrize("dora", [True, False])
def test_long_texts_cost_their_own_client_time_and_nobody_else(
    build: Callable[..., tuple[AdaptedModel, Config]], monkeypatch: pytest.MonkeyPatch, dora: bool
) -> None:
    """Alone (DoRA) a client's seconds are its own, together a share of them by its tokens; here a token takes one."""
    adapted, config = build(lora={"r": 4, "dora": dora}, train={"max_steps": 1})
    data = [[example(c, 188 if c == 0 else 8, 1)] * 4 for c in range(3)]
    cohort, now = Cohort(adapted, 3), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    start = {n: t.double() for n, t in to_tensors(adapted.layout).items()}

    def turn(client: int, tokens: int, loss: float) -> None:
        now[0] += tokens

    works = [LocalWork(adapted, data[c], adapted.layout, {}, config, (c, 1, 1), turn) for c in range(3)]
    done = together([work.run(asking(Train(start, list(start)))) for work in works], cohort.run_all)
    assert [outcome.seconds for outcome in done] == pytest.approx([800.0, 80.0, 80.0])
    assert cohort.stacked == (0 if dora else 3)
