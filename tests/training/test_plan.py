"""The planner: what it chooses on machines of all sizes, and that it keeps to what is set by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedtune.config import Settings
from fedtune.config.schema import ModelSettings
from fedtune.machine import cores
from fedtune.models import measure
from fedtune.models.adapter import AdaptedModel, attach
from fedtune.models.load import load
from fedtune.models.packing import CALL
from fedtune.training.cohort import Cohort
from fedtune.training.executor import Limits, Sequential, rehearse
from fedtune.training.plan import Machine, Plan, executor, plan
from fedtune.types import ConfigError, ModelError

LAPTOP = Machine("cpu", 2, 8 * 2**30, 2.4e11)
GPU = Machine("cuda", 16, 130 * 2**30, 7.9e14)


@pytest.fixture(scope="module")
def adapted(settings: Callable[..., Settings]) -> AdaptedModel:
    config = settings().config
    return attach(load(ModelSettings(name=config.model.name)), config.lora, 0)


def planned(settings: Callable[..., Settings], adapted: AdaptedModel, known: Machine, **changes: Any) -> Plan:
    return plan(settings(**changes).config, adapted, 512, 4 * 100.0, known)


def test_a_cpu_trains_one_client_at_a_time_and_keeps_activations(
    settings: Callable[..., Settings], adapted: AdaptedModel
) -> None:
    found = planned(settings, adapted, LAPTOP)
    assert (found.cohort, found.checkpointing, found.tokens, found.threads) == (1, False, 4096, 2)
    assert isinstance(executor(found, adapted), Sequential)
    assert "1 client per pass" in found.line()


def test_a_gpu_takes_as_many_clients_as_fill_it(settings: Callable[..., Settings], adapted: AdaptedModel) -> None:
    many = {"federation": {"clients": 40}}
    small = planned(settings, adapted, GPU, **many)
    assert small.cohort == 16
    assert isinstance(executor(small, adapted), Cohort)
    assert planned(settings, adapted, GPU).cohort == 4, "no more than are asked a round"
    busy = planned(settings, adapted, Machine("cuda", 16, 130 * 2**30, 1e9), **many)
    assert busy.cohort == 1


def test_little_memory_means_recomputing_and_small_passes(
    settings: Callable[..., Settings], adapted: AdaptedModel
) -> None:
    found = planned(settings, adapted, Machine("cpu", 2, 2**20, 2.4e11))
    assert found.checkpointing
    assert found.tokens < 4096
    assert found.tokens & (found.tokens - 1) == 0, "a power of two: a little more memory changes nothing"


def test_what_is_set_by_hand_stays(settings: Callable[..., Settings], adapted: AdaptedModel) -> None:
    by_hand = {
        "executor": "cohort",
        "cohort": 3,
        "max_tokens_per_forward": 777,
        "gradient_checkpointing": True,
        "threads": 1,
    }
    found = planned(settings, adapted, LAPTOP, engine=by_hand)
    assert (found.cohort, found.tokens, found.checkpointing, found.threads) == (3, 777, True, 1)
    assert (found.bucket, planned(settings, adapted, LAPTOP, engine={"bucket": 5}).bucket) == (CALL["cpu"], 5)
    assert planned(settings, adapted, GPU, engine={"executor": "sequential"}).cohort == 1
    with pytest.raises(ConfigError, match="no effect with executor = sequential"):
        settings(engine={"executor": "sequential", "cohort": 3})


def test_a_plan_survives_the_manifest_and_the_engine_is_not_part_of_a_run(settings: Callable[..., Settings]) -> None:
    found = Plan("float32", 2, 4096, False, 1, 8192, ("a", "b"))
    assert Plan.read({**vars(found), "why": ["a", "b"]}) == found
    assert settings().config.hash == settings(engine={"threads": 1, "cohort": 2}).config.hash


def test_16_bits_only_where_they_are_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import reload

    fresh = reload(measure)
    for speed, best in ((1.2, torch.float32), (3.0, torch.bfloat16)):
        rates = {torch.float32: 1e11, torch.bfloat16: speed * 1e11}
        monkeypatch.setattr(fresh, "gemm_rate", lambda m, k, n, dtype, where, rates=rates: rates[dtype])
        fresh.best_dtype.cache_clear()
        assert fresh.best_dtype("cpu") is best
    fresh.best_dtype = lambda device: torch.float32  # type: ignore[assignment]  # as the other tests have it


def test_measures_of_this_machine_are_of_a_sensible_size() -> None:
    assert cores() >= 1
    assert 2**26 < measure.free_memory(torch.device("cpu")) < 2**50
    assert 0 < measure.gemm_rate(64, 64, 64, torch.float32, torch.device("cpu"), 0.01) < float("inf")


def test_a_row_of_zeros_under_dora_is_named_before_anything_is_trained(settings: Callable[..., Settings]) -> None:
    config = settings(lora={"dora": True}).config
    base = load(ModelSettings(name=config.model.name))
    with torch.no_grad():
        base.model.model.layers[1].self_attn.v_proj.weight[3] = 0
    zeroed = attach(base, config.lora.model_copy(update={"target_modules": ("q_proj", "v_proj")}), 0)
    with pytest.raises(ModelError, match=r"row 3 of model\.layers\.1\.self_attn\.v_proj is all zeros \(1 of 16 rows"):
        planned(lambda **_: settings(lora={"dora": True}), zeroed, LAPTOP)
    rehearse(attach(load(ModelSettings(name=config.model.name)), config.lora, 0), Limits(), exact=True)


def test_a_gradient_that_is_no_number_is_named_before_anything_is_trained(settings: Callable[..., Settings]) -> None:
    config = settings().config
    base = load(ModelSettings(name=config.model.name))
    with torch.no_grad():
        base.model.model.norm.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"the gradient of base_model.* has NaN or infinity"):
        rehearse(attach(base, config.lora, 0), Limits(), exact=True)
