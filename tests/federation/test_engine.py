"""The engine beside the training: nothing copied, nothing kept that is not needed, and many clients."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedtune import methods
from fedtune.config import Config, Settings
from fedtune.config.schema import ModelSettings
from fedtune.experiment import arms
from fedtune.experiment.arms import Arm
from fedtune.experiment.reporter import Reporter
from fedtune.federation import messages
from fedtune.federation.checkpoint import Progress
from fedtune.federation.pool import LocalPool, Steps, complete
from fedtune.lora.algebra import RunningMean, weighted_mean
from fedtune.lora.state import to_tensors
from fedtune.methods import METHODS, Algorithm, ServerState
from fedtune.models.adapter import attach
from fedtune.models.budget import message_bytes
from fedtune.models.load import load
from fedtune.objectives import Example
from fedtune.training.cohort import Cohort
from fedtune.training.executor import Executor, Sequential
from fedtune.training.workload import EncodedShards
from fedtune.types import RoundRecord

TEXTS = [Example.labelled(range(5, 12 + i), 6 + i) for i in range(5)]


def arm(config: Config, folder: Path, clients: int, cohort: int = 1) -> Arm:
    """An arm of a run on the tiny model; the shards of many clients are made of few texts."""
    adapted = attach(load(ModelSettings(name=config.model.name)), config.lora, seed=1)
    shards = tuple((TEXTS[c % 5], TEXTS[(c + 1) % 5]) for c in range(clients))
    executor: Executor = Cohort(adapted, cohort) if cohort > 1 else Sequential(adapted)
    encoded = EncodedShards(shards, (), 0)
    return Arm(config, adapted, encoded, adapted.state(), "run", folder, Reporter(), LocalPool(executor))


def test_nothing_is_serialised_in_one_process(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bytes:
        raise AssertionError("an array was turned into bytes")

    monkeypatch.setattr(messages.TensorArray, "data", property(refuse))
    config = settings(federation={"clients": 3, "rounds": 2}).config
    assert complete(arms.train(arm(config, tmp_path, 3))).round == 2


def test_messages_of_one_process_carry_the_tensor_itself() -> None:
    tensor = torch.ones(2, 3)
    record = messages.pack({"x": tensor}, in_process=True)
    assert messages.unpack(record)["x"] is tensor
    assert (record["x"].dtype, record["x"].shape, record["x"].stype) == ("float32", (2, 3), "numpy.ndarray")
    assert torch.equal(torch.from_numpy(record["x"].numpy()), tensor)


def _run(config: Config, folder: Path, clients: int, cohort: int = 1) -> dict[str, Tensor]:
    return to_tensors(complete(arms.train(arm(config, folder, clients, cohort))).state.adapter)


@pytest.mark.parametrize("name", [n for n, kind in METHODS.items() if kind.linear])
def test_adding_up_as_they_come_gives_what_all_at_once_gives(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = settings(federation={"clients": 5, "rounds": 2}, method__name=name).config
    assert methods.create(config).linear
    added = _run(config, tmp_path / "a", 5)
    monkeypatch.setattr(Algorithm, "linear", property(lambda self: False))
    together = _run(config, tmp_path / "b", 5)
    assert all(torch.allclose(added[n], together[n], rtol=1e-6, atol=1e-8) for n in together)


@pytest.mark.parametrize(("name", "own"), [*((n, {}) for n in METHODS), ("fedkseed", {"steps": 5})])
def test_what_honest_clients_report_is_what_the_plan_allows(
    settings: Callable[..., Settings], tmp_path: Path, name: str, own: dict[str, Any]
) -> None:
    config = settings(federation={"clients": 2, "rounds": 2}, method={"name": name, **own}).config
    for record in complete(arms.train(arm(config, tmp_path, 2))).records:
        assert record.notes == ()
        assert record.rejected == ()
        assert all(
            (c.examples, c.tokens > 0, c.steps > 0, c.loss is not None) == (2, *[True] * 3) for c in record.clients
        )


def test_what_compares_updates_gets_them_all(settings: Callable[..., Settings]) -> None:
    for changes in (
        {"robust": {"rule": "trimmed"}, "method": {"name": "ffa_lora"}},
        {"robust": {"clip_norm": 1.0}, "method": {"name": "ffa_lora"}},
        {"method": {"name": "flexlora"}},
        {"method": {"name": "fedalt"}},
    ):
        assert not methods.create(settings(**changes).config).linear
    sgd = {"drift": {"scaffold": True}, "train": {"optimizer": "sgd"}}
    assert not methods.create(settings(**sgd).config).linear


def test_memory_does_not_grow_with_the_cohort(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    plain = messages.read_reply

    def watched(message: Message, clients: Any) -> Any:
        nonlocal most
        reply = plain(message, clients)
        living.update((reply.tensors or {}).values())
        most = max(most, len(living))
        return reply

    monkeypatch.setattr(messages, "read_reply", watched)
    config = settings(federation={"clients": 40, "rounds": 1}, train={"max_steps": 1}).config
    _run(config, tmp_path, 40)
    tensors = len(to_tensors(arm(config, tmp_path, 1).start))
    assert 0 < most <= 2 * tensors


def test_a_running_mean_is_the_mean_whatever_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"x": torch.randn(50, generator=generator) * 10.0 ** (i % 5)} for i in range(200)]
    weights = [1.0 + i % 7 for i in range(200)]
    forwards = weighted_mean(states, weights)["x"]
    backwards = weighted_mean(states[::-1], weights[::-1])["x"]
    exact = sum(s["x"].double() * w for s, w in zip(states, weights, strict=True)) / sum(weights)
    assert torch.equal(forwards, backwards)
    assert torch.equal(forwards, exact.float())
    with pytest.raises(ValueError, match="weights sum to"):
        RunningMean().mean()


def test_a_run_in_cohorts_is_the_run_one_by_one(settings: Callable[..., Settings], tmp_path: Path) -> None:
    config = settings(federation={"clients": 5, "rounds": 2}, lora__dropout=0.1).config
    one, many = (_run(config, tmp_path / str(k), 5, k) for k in (1, 4))
    assert all(torch.allclose(one[n], many[n], atol=1e-6) for n in one)
    faulty = settings(federation={"clients": 5, "rounds": 2, "faults": {"error": 0.3, "dropout": 0.2}}).config
    one, many = (_run(faulty, tmp_path / f"f{k}", 5, k) for k in (1, 4))
    assert all(torch.allclose(one[n], many[n], atol=1e-6) for n in one)


def test_a_thousand_clients_of_a_hundred_thousand(settings: Callable[..., Settings], tmp_path: Path) -> None:
    changes = {"clients": 100_000, "rounds": 1, "fraction": 0.01}
    train = {"max_steps": 1, "per_device_train_batch_size": 1}
    config = settings(federation=changes, train=train).config
    large = arm(config, tmp_path, 100_000)
    progress = complete(arms.train(large))
    record = progress.records[0]
    assert (len(record.cohort), len(record.clients), record.rejected) == (1000, 1000, ())
    assert arms.wire(config, large.start)(1) == record.bytes_down + record.bytes_up  # type: ignore[misc]


def test_no_round_is_drawn_to_count_bytes_where_all_ranks_are_one(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> list[int]:
        raise AssertionError("a cohort was drawn")

    config = settings(federation={"clients": 200, "rounds": 4, "fraction": 0.1}).config
    made = arm(config, tmp_path, 1)
    counted = arms.wire(config, made.start)
    monkeypatch.setattr(arms, "draw", refuse)
    message = message_bytes(to_tensors(made.start))
    assert [counted(r) for r in (1, 4)] == [20 * 2 * message] * 2  # type: ignore[misc]


def test_the_records_of_a_run_are_one_list_that_grows() -> None:
    record = RoundRecord(1, "ok", 0.1, (0,), (), (), 0, 0)
    first = Progress(ServerState({}))
    second = first.after(ServerState({}, 1), record, 0, {"round": 1})
    assert second.records is first.records
    assert (second.round, second.state.round, second.timing) == (1, 1, {"round": 1})


def test_a_client_asked_twice_counts_once(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """A second reply is no second weight, also where updates are added up as they come."""
    config = settings(federation={"clients": 3, "rounds": 1}).config
    plain = _run(config, tmp_path / "a", 3)

    class Twice(arms.LocalGrid):
        def exchange(self, orders: Any, take: Callable[[Any], None], timeout: float | None = None) -> Steps[None]:
            def twice(reply: Any) -> None:
                take(reply)
                take(reply)

            return super().exchange(orders, twice, timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "LocalGrid", Twice)
        done = complete(arms.train(arm(config, tmp_path / "b", 3)))
    assert [r.reason for r in done.records[0].rejected] == ["duplicate"] * 3
    assert all(torch.equal(t, plain[n]) for n, t in to_tensors(done.state.adapter).items())
    assert replace(done.records[0], rejected=()).clients == done.records[0].clients
