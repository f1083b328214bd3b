"""Gradients of a loss over several texts are those of the same loss written with plain logits, however they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fedtune.config import Config, Settings
from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.config.section import Section
from fedtune.data.encode import Text
from fedtune.methods.requests import Tensors, Train
from fedtune.models import head
from fedtune.models.adapter import AdaptedModel, attach
from fedtune.models.load import LoadedModel, load
from fedtune.models.proof import proof_of
from fedtune.objectives import CrossEntropy, Example, Objective
from fedtune.training.cohort import Cohort
from fedtune.training.executor import Limits, Sequential, Work, training
from fedtune.training.gradients import backpropagate, one_pass
from fedtune.training.loss import Part, Step, passes
from tests.architectures import causal_configs, tiny


class Preference(Objective[Section]):
    """DPO without a reference: the chosen text is to be likelier than the others together."""

    name = "toy-preference"
    title = "Toy"
    texts = 3

    def loss(self, logs: Sequence[Tensor], example: Example) -> Tensor:
        chosen, *rejected = [own.sum() for own in logs]
        return softplus(0.3 * (torch.stack(rejected).logsumexp(0) - chosen))


class Steepness(Objective[Section]):
    """Of single labels, not of their sum: labels that are unlikely count more; long answers count more."""

    name = "toy-steepness"
    title = "Toy"
    texts = 3

    def weight(self, example: Example) -> float:
        return 0.5 + example.labels

    def loss(self, logs: Sequence[Tensor], example: Example) -> Tensor:
        every = torch.cat(list(logs))
        return ((1 - every.exp()).square() * -every).mean()


class SumOfTexts(CrossEntropy):
    """Cross-entropy by the way that any objective takes."""

    total = Objective.total


OBJECTIVES = [Preference, Steepness, SumOfTexts]


def text(generator: torch.Generator, prompt: Sequence[int]) -> Text:
    """Two turns, each with labels; what is between them is none."""
    sizes = [int(torch.randint(1, 6, (1,), generator=generator)) for _ in range(3)]
    drawn = torch.randint(5, 100, (sum(sizes),), generator=generator).tolist()
    start = len(prompt)
    spans = ((start, start + sizes[0]), (start + sizes[0] + sizes[1], start + sum(sizes)))
    return Text((*prompt, *drawn), spans)


def example(seed: int) -> Example:
    """Two or three answers to one question; all questions begin alike."""
    generator = torch.Generator().manual_seed(seed)
    prompt = [*range(20, 30), *torch.randint(5, 100, (1 + seed % 3,), generator=generator).tolist()]
    return Example(tuple(text(generator, prompt) for _ in range(2 + seed % 2)))


EXAMPLES = [example(seed) for seed in range(5)]


def doubled(loaded: LoadedModel, seed: int = 3, **lora: Any) -> AdaptedModel:
    """Return a model in float64 whose adapter is away from its start."""
    loaded.model.double().requires_grad_(False)
    adapted = attach(loaded, LoraSettings(r=2, alpha=4.0, **lora), seed)
    generator = torch.Generator().manual_seed(seed)
    for slot in adapted.slots.values():
        slot.data = 0.2 * torch.randn(slot.shape, generator=generator, dtype=torch.float64)
    return adapted


@pytest.fixture
def model(tiny_folder: Any) -> AdaptedModel:
    return doubled(load(ModelSettings(name=str(tiny_folder))))


@pytest.fixture(scope="module")
def hybrid() -> AdaptedModel:
    """Convolutions between layers of attention: its texts pass one at a time."""
    base = tiny(causal_configs()["lfm2"]).requires_grad_(False)
    adapted = doubled(LoadedModel(base, None, "tiny", "x"), target_modules=["q_proj", "w1"], dropout=0.25)
    assert proof_of(base).why
    return adapted


def plain(adapted: AdaptedModel, examples: Sequence[Example], objective: Objective[Any]) -> tuple[float, list[Tensor]]:
    """The loss as it is written down: one text at a time, all logits, transformers' own attention, plain autograd."""
    total, weights = 0.0, 0.0
    for each in examples:
        logs = []
        for own in each.texts:
            table = adapted.model(input_ids=torch.tensor([own.ids])).logits[0].log_softmax(-1)
            places = [i for start, end in own.spans for i in range(start, end)]
            logs.append(torch.stack([table[i - 1, own.ids[i]] for i in places]))
        total = total + objective.weight(each) * objective.loss(logs, each)
        weights += objective.weight(each)
    loss: Any = total / weights
    return float(loss.detach()), list(torch.autograd.grad(loss, list(adapted.slots.values()), allow_unused=True))


def made(adapted: AdaptedModel, step: Step, tokens: int, exact: bool = True, checkpointing: bool = False) -> Any:
    for slot in adapted.slots.values():
        slot.requires_grad_(True).grad = None
    with training(adapted.model, checkpointing):
        loss = backpropagate(adapted, step, tokens, exact=exact)
    return loss, [slot.grad for slot in adapted.slots.values()]


def same(one: Any, two: Any) -> bool:
    """Equal to what float64 rounds."""
    (loss, gradients), (other, others) = one, two
    scale = max(float(g.abs().max()) for g in gradients)
    close = all(torch.allclose(g, o, rtol=0, atol=1e-12 * scale) for g, o in zip(gradients, others, strict=True))
    return close and loss == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tokens", [4096, 60, 1])
@pytest.mark.parametrize("plain_head", [True, False])
def test_packed_and_micro_batched(
    model: AdaptedModel, objective: type[Any], tokens: int, plain_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = objective(Section())
    want = plain(model, EXAMPLES, chosen)
    assert all(float(g.abs().max()) > 1e-6 for g in want[1])
    monkeypatch.setattr(head, "CHUNK", 1000)
    monkeypatch.setattr("fedtune.training.loss.has_plain_head", lambda model: plain_head)
    for exact in (True, False):
        assert same(made(model, Step(EXAMPLES, chosen), tokens, exact), want)
    assert same(made(model, Step(EXAMPLES, chosen), tokens, checkpointing=True), want)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_text_at_a_time(hybrid: AdaptedModel, objective: type[Any]) -> None:
    chosen = objective(Section())
    want = plain(hybrid, EXAMPLES, chosen)
    for tokens in (4096, 1):
        assert same(made(hybrid, Step(EXAMPLES, chosen), tokens), want)
    hybrid.model.eval()
    with torch.no_grad():
        parts = [part for row in passes([Step(EXAMPLES, chosen)], 60) for part in row.values()]
        values = [sum(one_pass(hybrid, [part], exact=True)) for part in parts]
    assert sum(values) == pytest.approx(want[0], rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_text_at_a_time_drops_what_its_own_keys_say(hybrid: AdaptedModel, objective: type[Any]) -> None:
    """Dropout is of the text and its place in the step: passes and recomputing change nothing, another key does."""
    step = Step(EXAMPLES, objective(Section()), key=7)
    want = made(hybrid, step, 4096, exact=False)
    assert same(made(hybrid, step, 1, exact=False), want)
    assert same(made(hybrid, step, 60, exact=False, checkpointing=True), want)
    assert not same(made(hybrid, Step(EXAMPLES, step.objective, key=8), 4096, exact=False), want)


def test_dropout_is_the_same_packed_and_micro_batched(tiny_folder: Any) -> None:
    adapted = doubled(load(ModelSettings(name=str(tiny_folder))), dropout=0.25)
    step = Step(EXAMPLES, Preference(Section()), key=7)
    want = made(adapted, step, 4096, exact=False)
    assert same(made(adapted, step, 1, exact=False), want)
    assert not same(made(adapted, step, 4096, exact=True), want)


def test_a_pass_never_separates_the_texts_of_an_example() -> None:
    step = Step(EXAMPLES, Preference(Section()), key=3)
    for tokens in (1, 30, 60, 100, 10_000):
        parts = [part for row in passes([step], tokens) for part in row.values()]
        assert [each for part in parts for each in part.examples] == EXAMPLES
        counts = [sum(len(e.texts) for e in part.examples) for part in parts]
        assert [part.first for part in parts] == [sum(counts[:i]) for i in range(len(parts))]
        assert all(part.share == 1 / len(EXAMPLES) for part in parts)
        assert all(len(part.examples) == 1 or len([i for t in part.texts for i in t]) <= tokens for part in parts)


def _works(start: Tensors, config: Config, losses: dict[int, list[float]]) -> list[Work]:
    """Four clients of three objectives, as in a sweep."""
    works = []
    for client, kind in enumerate((Preference, Steepness, Preference, CrossEntropy)):
        steps = [[example(50 * client + 3 * step + i) for i in range(3)] for step in range(3)]
        works.append(
            Work(
                Train({n: t + 0.01 * client for n, t in start.items()}, list(start)),
                steps=steps,
                rate=5e-3,
                settings=config.train,
                seed=client,
                exact=True,
                on_step=lambda examples, loss, client=client: losses[client].append(loss),
                objective=kind(Section()),
            )
        )
    return works


def test_clients_of_different_objectives_in_one_pass_get_what_they_get_alone(
    model: AdaptedModel, settings: Callable[..., Settings]
) -> None:
    config, start = settings().config, {n: slot.detach().clone() for n, slot in model.slots.items()}
    cohort, outcomes = Cohort(model, 4, Limits(200)), []
    for executor in (Sequential(model, Limits(50)), cohort):
        losses: dict[int, list[float]] = {client: [] for client in range(4)}
        works = _works(start, config, losses)
        outcomes.append(([done.result() for done in executor.run_all(works)], losses))
    (alone, own), (together, shared) = outcomes
    assert cohort.stacked == 4
    for one, two in zip(alone, together, strict=True):
        assert all(torch.allclose(one[n], two[n], rtol=1e-9, atol=1e-12) for n in one)
    assert all(own[c] == pytest.approx(shared[c], rel=1e-9) for c in own)
    assert len({tuple(each) for each in own.values()}) == 4


def test_cross_entropy_in_one_sum_is_cross_entropy_example_by_example() -> None:
    logs = -torch.rand(sum(e.labels for e in EXAMPLES), dtype=torch.float64)
    one, two = CrossEntropy(Section()), SumOfTexts(Section())
    assert float(one.total(logs, EXAMPLES, 0.25)) == pytest.approx(float(two.total(logs, EXAMPLES, 0.25)), rel=1e-14)
    assert float(Part(EXAMPLES, 0.25).loss(logs)) == pytest.approx(float(-logs.sum() / 4), rel=1e-14)
