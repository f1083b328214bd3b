"""The gates of every speed-up, C1 to C12: a ratio is only worth something if both sides give the same.

C1 to C5 (float64, float32 and bfloat16 cohorts, permutation, isolation) are in test_cohort.py; C6 to C8 (padding, labels only,
recomputation) in test_local.py and test_cohort.py; C11 (evaluation item by item) in evaluation/test_run.py; C12 (bytes) in
models/test_adapter.py. Here are C9, training by the stock Trainer, and C10, whole rounds by the reference's procedure.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.reference import Reference, averaged, padded

from fedtune.config import Config, Settings
from fedtune.config.schema import ModelSettings
from fedtune.experiment import arms
from fedtune.experiment.reporter import Reporter
from fedtune.federation.pool import LocalPool, complete
from fedtune.lora.state import to_tensors
from fedtune.methods.requests import Train
from fedtune.models.adapter import attach
from fedtune.models.load import load
from fedtune.objectives import Example
from fedtune.training import schedule
from fedtune.training.client import LocalWork
from fedtune.training.cohort import Cohort
from fedtune.training.executor import Sequential
from fedtune.training.workload import EncodedShards
from tests.training.programs import asked
from tests.training.test_cohort import distance, shards


@pytest.fixture(scope="module")
def config(settings: Callable[..., Settings]) -> Config:
    train = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate_max": 2e-3, "max_grad_norm": 0.7}
    return settings(train=train, federation={"clients": 3, "rounds": 3}).config


def test_c9_one_client_is_stock_peft_and_the_stock_trainer(config: Config, tmp_path: Path) -> None:
    """Ten steps by Hugging Face's Trainer: padded, all logits, its optimiser, clipping and gradient accumulation."""
    from peft import set_peft_model_state_dict
    from transformers import Trainer, TrainingArguments

    adapted = attach(load(ModelSettings(name=config.model.name)), config.lora, seed=3)
    shard, start = shards(1)[0], to_tensors(adapted.state())
    local = LocalWork(adapted, shard, adapted.layout, {}, config, (0, 1, 1))
    ours = asked(local, Train(start, list(start)))
    stock = Reference(Path(config.model.name), config, checkpointing=False).model()
    set_peft_model_state_dict(stock, start)
    steps = [[shard[i] for i in rows] for rows in local.plan]
    micro = [example for step in steps for example in step]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(micro)  # type: ignore[arg-type]

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=len(steps),
        per_device_train_batch_size=4,
        learning_rate=local.rate,
        lr_scheduler_type="constant",
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
        adam_beta1=config.train.adam_beta1,
        adam_beta2=config.train.adam_beta2,
        adam_epsilon=config.train.adam_epsilon,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
        return padded(examples, 2)

    InOrder(stock, arguments, train_dataset=micro, data_collator=collate).train()  # type: ignore[arg-type]
    from peft import get_peft_model_state_dict

    theirs = {n: t.detach() for n, t in get_peft_model_state_dict(stock).items()}
    assert distance(ours, theirs) <= 1e-4
    assert distance(ours, start) > 1e-2


@pytest.mark.parametrize("cohort", [1, 3])
def test_c10_rounds_are_those_of_the_references_procedure(config: Config, tmp_path: Path, cohort: int) -> None:
    """Three rounds of three clients: a model loaded for each message, padded batches, recomputation; and ours."""
    adapted = attach(load(ModelSettings(name=config.model.name)), config.lora, seed=3)
    start, data = adapted.state(), shards(3)
    executor = Cohort(adapted, cohort) if cohort > 1 else Sequential(adapted)
    encoded = EncodedShards(tuple(map(tuple, data)), (), 0)
    arm = arms.Arm(config, adapted, encoded, start, "run", tmp_path, Reporter(), LocalPool(executor))
    ours = to_tensors(complete(arms.train(arm)).state.adapter)
    reference, state = Reference(Path(config.model.name), config), dict(to_tensors(start))
    for round_ in range(1, 4):
        rate, done, weights = schedule.learning_rate(config.train, round_, 3), [], []
        for client, shard in enumerate(data):
            plan = schedule.batches(config.train, len(shard), config.seed, client, round_)
            done.append(reference.fit(state, [[shard[i] for i in rows] for rows in plan], rate))
            weights.append(len({i for rows in plan for i in rows}))
        state = averaged(done, weights)
    assert reference.loads == 9
    assert distance(ours, state) <= 1e-4
    assert distance(ours, to_tensors(start)) > 1e-2
