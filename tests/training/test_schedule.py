import math
from collections import Counter

import pytest

from fedtune.config.schema import TrainSettings
from fedtune.training.schedule import batches, learning_rate

TEMPLATE = TrainSettings(
    learning_rate_max=5e-5, learning_rate_min=1e-6, max_steps=10, per_device_train_batch_size=16, rows="repeat"
)
FRESH = TrainSettings(max_steps=3, per_device_train_batch_size=4)


def test_the_cosine_over_rounds_is_the_templates() -> None:
    want = 1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + math.cos(math.pi * 1 / 200))
    assert learning_rate(TEMPLATE, 1, 200) == pytest.approx(want)
    assert learning_rate(TEMPLATE, 1, 200) < 5e-5
    assert learning_rate(TEMPLATE, 200, 200) == pytest.approx(1e-6)


def test_the_template_sees_the_same_160_rows_for_ever() -> None:
    rounds = [batches(TEMPLATE, 2600, seed=0, client=1, round_=r) for r in (1, 2, 77)]
    assert rounds[0] == rounds[1] == rounds[2]
    assert len({i for step in rounds[0] for i in step}) == 160


def test_fresh_rows_are_fresh_every_round_and_use_each_row_once_an_epoch() -> None:
    drawn = [i for r in range(1, 6) for step in batches(FRESH, 60, 7, 0, r) for i in step]
    assert sorted(drawn) == list(range(60))
    assert batches(FRESH, 60, 7, 0, 2) != batches(FRESH, 60, 7, 1, 2)
    assert batches(FRESH, 60, 7, 0, 2) != batches(FRESH, 60, 8, 0, 2)


def test_a_client_that_misses_rounds_skips_their_rows() -> None:
    """Then fresh means a fresh draw, not each row once: some come twice before others have come."""
    counts = Counter(i for r in (1, 2, 3, 4, 6, 7) for step in batches(FRESH, 60, 7, 0, r) for i in step)
    missed = {i for step in batches(FRESH, 60, 7, 0, 5) for i in step}
    assert len(missed) == 12
    assert 2 in counts.values()
    assert any(counts[i] == 0 for i in missed)
    assert all(counts[i] > 0 for i in range(60) if i not in missed)


@pytest.mark.parametrize("size", [1, 3, 11])
def test_shards_smaller_than_a_batch_still_give_every_step(size: int) -> None:
    for train in (FRESH, TEMPLATE):
        plan = batches(train, size, 0, 0, 4)
        assert len(plan) == train.max_steps
        assert all(step and set(step) <= set(range(size)) for step in plan)


def test_the_template_order_is_hugging_face_trainers(tmp_path: object) -> None:
    """The rows the Trainer really draws with its default seed, recorded from its data loader."""
    import torch
    from transformers import Trainer, TrainingArguments

    from tests.tiny import make_model

    drawn: list[int] = []

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 37

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            ids = torch.tensor([3, 4 + i % 5, 5])
            return {"input_ids": ids, "labels": ids, "row": torch.tensor(i)}

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        drawn.extend(int(r.pop("row")) for r in rows)
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

    args = TrainingArguments(
        str(tmp_path), max_steps=7, per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    Trainer(make_model(), args, train_dataset=Rows(), data_collator=collate).train()
    repeat = TrainSettings(max_steps=7, per_device_train_batch_size=8, rows="repeat")
    ours = [i for step in batches(repeat, 37, 0, 0, 1) for i in step]
    assert drawn[: len(ours)] == ours
