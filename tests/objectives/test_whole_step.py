"""An objective whose loss needs the log-probabilities of a whole step: KTO, as another package would write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from fedtune import objectives
from fedtune.config import Settings
from fedtune.config.schema import ModelSettings
from fedtune.config.section import Section
from fedtune.data.check import TrainRow
from fedtune.data.encode import Encoder
from fedtune.experiment.run import run
from fedtune.io import read_lines
from fedtune.methods.requests import Losses, Train
from fedtune.models.adapter import AdaptedModel
from fedtune.models.load import load
from fedtune.objectives import Example, Objective, by_text
from fedtune.training.client import LocalWork
from fedtune.training.cohort import Cohort
from fedtune.training.executor import Limits, Sequential, Work, training
from fedtune.training.loss import Part, Step, keyed, label_logs
from tests.conftest import ASK, SENTENCES, write_jsonl
from tests.objectives.test_gradients import EXAMPLES, doubled, example, made, same
from tests.objectives.test_gradients import hybrid as hybrid
from tests.objectives.test_gradients import model as model
from tests.training.programs import asked


class KTOSettings(Section):
    """`beta`: how steep; `token`: what the reference model, which knows nothing, gives each token, in nats."""

    beta: float = Field(0.1, gt=0)
    token: float = Field(-5.0, lt=0)


@dataclass(frozen=True)
class Judged(Example):
    """An answer with a verdict; the second text is the same question with somebody else's answer."""

    good: bool = True


class KTO(Objective[KTOSettings]):
    """Answers that are good or bad, each on its own (arXiv 2402.01306, equations 7 and 8; weights of 1)."""

    name = "kto"
    title = "KTO"
    paper = "arXiv:2402.01306"
    columns = ("verdict", "unrelated")
    texts = 2
    whole_step = True
    Parameters = KTOSettings

    def encode(self, row: TrainRow, encoder: Encoder) -> Example:
        *before, (question, answer) = encoder.turns(row)
        texts = [encoder.text((*before, (question, each))) for each in (answer, row.columns["unrelated"])]
        return Judged(tuple(texts), row.columns["verdict"] == "good")

    def total(self, logs: Tensor, examples: Sequence[Example], share: float) -> Tensor:
        each = [[own.sum() - self.parameters.token * len(own) for own in texts] for texts in by_text(logs, examples)]
        reward, unrelated = (torch.stack(column) for column in zip(*each, strict=True))
        reference = unrelated.mean().clamp(min=0).detach()
        side = torch.tensor([1.0 if getattr(e, "good", True) else -1.0 for e in examples])
        return (1 - torch.sigmoid(self.parameters.beta * side * (reward - reference))).mean()


class Spread(Objective[Section]):
    """The gradient also goes through the term that all examples share: how far their likelihoods are apart."""

    name = "toy-spread"
    title = "Toy"
    texts = 3
    whole_step = True

    def total(self, logs: Tensor, examples: Sequence[Example], share: float) -> Tensor:
        means = torch.stack([torch.cat(texts).mean() for texts in by_text(logs, examples)])
        return -means.mean() + 0.7 * means.var() + 0.1 * (logs.exp().square()).sum()


PAIRS = [Judged(e.texts[:2], number % 2 == 0) for number, e in enumerate(EXAMPLES)]
CASES = [(KTO(KTOSettings(beta=0.3, token=-4.5)), PAIRS), (Spread(Section()), EXAMPLES)]
of_each = pytest.mark.parametrize(("objective", "examples"), CASES, ids=["kto", "spread"])


def plain(adapted: AdaptedModel, examples: Sequence[Example], objective: Objective[Any]) -> Any:
    """The loss as it is written down: one text at a time, all logits, transformers' own attention, plain autograd."""
    logs = []
    for own in (text for each in examples for text in each.texts):
        table = adapted.model(input_ids=torch.tensor([own.ids])).logits[0].log_softmax(-1)
        logs += [table[i - 1, own.ids[i]] for start, end in own.spans for i in range(start, end)]
    loss = objective.total(torch.stack(logs), examples, 1 / len(examples))
    return float(loss.detach()), list(torch.autograd.grad(loss, list(adapted.slots.values())))


@of_each
def test_gradients_are_those_of_the_whole_step_however_it_is_cut(
    model: AdaptedModel, objective: Objective[Any], examples: Sequence[Example]
) -> None:
    want = plain(model, examples, objective)
    assert all(float(g.abs().max()) > 1e-7 for g in want[1])
    for tokens in (4096, 60, 1):
        for exact in (True, False):
            assert same(made(model, Step(examples, objective), tokens, exact), want)
        assert same(made(model, Step(examples, objective), tokens, checkpointing=True), want)
    # the other examples matter: a step of the first alone is another than its part of this one
    assert not same(made(model, Step(examples[:2], objective), 4096), want)


@of_each
def test_texts_that_pass_one_at_a_time(
    hybrid: AdaptedModel, objective: Objective[Any], examples: Sequence[Example]
) -> None:
    want = plain(hybrid, examples, objective)
    for tokens in (4096, 1):
        assert same(made(hybrid, Step(examples, objective), tokens), want)
    dropped = made(hybrid, Step(examples, objective, key=7), 4096, exact=False)
    assert same(made(hybrid, Step(examples, objective, key=7), 60, exact=False), dropped)
    assert not same(made(hybrid, Step(examples, objective, key=8), 60, exact=False), dropped)


@of_each
def test_both_passes_drop_the_same(tiny_folder: Path, objective: Objective[Any], examples: Sequence[Example]) -> None:
    adapted = doubled(load(ModelSettings(name=str(tiny_folder))), dropout=0.25)
    part = Part(examples, 1 / len(examples), key=7, objective=objective)
    for slot in adapted.slots.values():
        slot.requires_grad_(True)
    with training(adapted.model, False), keyed(adapted.keys, [part], adapted.device):
        loss = part.loss(label_logs(adapted.model, [part]))
        want = float(loss.detach()), torch.autograd.grad(loss, list(adapted.slots.values()))
    step = Step(examples, objective, key=7)
    for tokens in (4096, 60, 1):
        assert same(made(adapted, step, tokens, exact=False), want)
    assert not same(made(adapted, step, 4096, exact=True), want)


def test_the_loss_is_worked_out_by_hand() -> None:
    objective = KTO(KTOSettings(beta=0.5, token=-1.0))
    texts = example(2).texts[:2]
    two = [Judged(tuple(replace(t, spans=((t.start, t.start + 1),)) for t in texts), good) for good in (True, False)]
    # rewards 2 and -1; of unrelated answers 1 and 3, so the reference is 2: 1 - s(0) = 0.5, 1 - s(1.5) = 0.18242552
    logs = torch.tensor([1.0, 0.0, -2.0, 2.0])
    assert float(objective.total(logs, two, 0.5)) == pytest.approx((0.5 + 0.18242552) / 2, rel=1e-6)
    # a mean below 0 is none: 1 - s(1), 1 - s(0.5)
    logs = torch.tensor([1.0, -4.0, -2.0, -4.0])
    assert float(objective.total(logs, two, 0.5)) == pytest.approx((0.26894142 + 0.37754067) / 2, rel=1e-6)


def test_clients_side_by_side_get_what_they_get_alone(model: AdaptedModel, settings: Callable[..., Settings]) -> None:
    start = {n: slot.detach().clone() for n, slot in model.slots.items()}
    own = [[PAIRS, PAIRS[:3]], [PAIRS[2:], PAIRS]]
    works = [
        Work(Train(start, list(start)), steps, 5e-3, settings().config.train, k, True, objective=CASES[0][0])
        for k, steps in enumerate(own)
    ]
    outcomes = [
        [o.result() for o in executor.run_all(works)]
        for executor in (Sequential(model, Limits(50)), Cohort(model, 2, Limits(200)))
    ]
    for one, two in zip(*outcomes, strict=True):
        assert all(torch.allclose(one[n], two[n], rtol=1e-9, atol=1e-12) for n in one)


def test_a_loss_without_gradient_is_the_same(model: AdaptedModel, settings: Callable[..., Settings]) -> None:
    start = {n: slot.detach().clone() for n, slot in model.slots.items()}
    config = settings(train__per_device_train_batch_size=len(PAIRS)).config
    work = LocalWork(model, PAIRS, model.layout, {}, config, (0, 1, 0), tokens=60)
    work._objective = CASES[0][0]
    model.model.eval()
    (found,) = asked(work, Losses(0, [start]))
    assert found == pytest.approx(plain(model, work._examples(0), work._objective)[0], rel=1e-12)


def test_a_run_learns_by_it(
    settings: Callable[..., Settings],
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(objectives.OBJECTIVES.own, "kto", KTO)
    rows = []
    for number, (label, text) in enumerate([(k, t) for k, texts in SENTENCES.items() for t in texts] * 4):
        wrong, other = (name for name in SENTENCES if name != label)
        good = number % 2 == 0
        row = {"instruction": ASK, "input": text, "output": label if good else wrong, "unrelated": other}
        rows.append({**row, "verdict": "good" if good else "bad"})
    write_jsonl(tmp_path / "data/train/finance_judged.jsonl", rows)
    (tmp_path / "data/eval").symlink_to(data_folder / "eval")
    made_of = settings(
        objective={"name": "kto", "beta": 0.5},
        train__learning_rate_max=5e-2,
        data__path=str(tmp_path / "data"),
        train__max_length=256,
        train__max_steps=3,
        federation__rounds=2,
        eval__limit=2,
    )
    path, result = run(made_of, tmp_path / "run")
    losses = [line["loss"] for line in read_lines(path / "rounds.jsonl")]
    assert result.lost_clients == 0
    assert all(0 < loss < 1 for loss in losses)
    assert losses[-1] < losses[0]
