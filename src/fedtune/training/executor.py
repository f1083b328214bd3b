"""What does the optimiser steps that methods ask for: here one client after the other, the plain way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fedtune.config.schema import TrainSettings
from fedtune.lora.state import Plain, to_tensors
from fedtune.methods.requests import Correction, Tensors, Train
from fedtune.models.adapted import AdaptedModel
from fedtune.models.interface import inner
from fedtune.models.proof import texts_for
from fedtune.objectives import Example, Objective
from fedtune.training.gradients import backpropagate
from fedtune.training.loss import CROSS_ENTROPY, Step
from fedtune.training.scheduler import Outcome, attempted, together
from fedtune.types import ModelError, derive_seed

T = TypeVar("T")
Slots = Mapping[str, torch.nn.Parameter]


def make_step(asked: Train, chosen: Slots, owners: Sequence[Tensor], limit: float, made: Any) -> None:
    """Make one optimiser step from the gradients that a step's loss has left, and what a method adds to them.

    The gradient of the loss is clipped before it is corrected: SCAFFOLD's control variates are means of the gradients
    that steps are made of, and a clip of the sum would not leave them that. What a mask freezes stays bit for bit, also
    under weight decay and momentum, which move an entry without a gradient.

    Args:
        asked: the method's request, with a term of the loss, masks and corrections of gradients.
        chosen: the trained tensors by name.
        owners: what the optimiser steps on, and whose gradients' joint norm is clipped.
        limit: the largest norm.
        made: the optimiser.
    """
    if asked.term and (extra := asked.term(chosen)) is not None:
        extra.backward()  # type: ignore[no-untyped-call]
    gradients = {name: slot.grad for name, slot in chosen.items() if slot.grad is not None}
    masks, correction = asked.masks or {}, asked.correction or {}
    for name in masks.keys() & gradients.keys():
        gradients[name].mul_(masks[name].to(gradients[name]))
    torch.nn.utils.clip_grad_norm_(owners, limit)
    for name in correction.keys() & gradients.keys():
        if isinstance(correction, Correction):
            correction.count(name, gradients[name].detach())
        gradients[name].add_(correction[name].to(gradients[name]))
    frozen = {name: chosen[name].detach().clone() for name in masks.keys() & chosen.keys()}
    made.step()
    with torch.no_grad():
        for name, was in frozen.items():
            chosen[name].copy_(torch.where(masks[name].to(was.device) == 0, was, chosen[name]))


@dataclass(frozen=True)
class Work:
    """Some optimiser steps of one client.

    Attributes:
        asked: the tensors at the beginning, which of them are trained, and what the method adds.
        steps: the examples of each step.
        rate: learning rate.
        settings: optimiser and clipping.
        seed: of what is random in them; each step has draws of its own.
        exact: nothing random tells equal beginnings of texts apart, so they are computed once.
        on_step: called with the examples and the loss of each step.
        on_start: called before the first step, and again where an attempt that failed is made anew.
        objective: what is minimised.
    """

    asked: Train
    steps: Sequence[Sequence[Example]]
    rate: float
    settings: TrainSettings
    seed: int
    exact: bool
    on_step: Callable[[Sequence[Example], float], None] = lambda examples, loss: None
    on_start: Callable[[], None] = lambda: None
    objective: Objective[Any] = CROSS_ENTROPY

    def step(self, number: int) -> Step:
        """Return a step, with a key of its own for what is random in it."""
        return Step(self.steps[number], self.objective, derive_seed(self.seed, "step", number))


# what a client has to do: it asks for optimiser steps, and goes on with the tensors that are trained
Jobs = Generator[Work, Any, T]


@dataclass(frozen=True)
class Limits:
    """What fits the machine: tokens of a pass at most (a longer text alone), and whether activations are recomputed."""

    tokens: int = 4096
    checkpointing: bool = False


class Executor(Protocol):
    """Does the steps that methods ask for; whoever does them, the numbers are the same but for rounding."""

    limits: Limits

    @property
    def size(self) -> int:
        """How many clients are worth training together."""
        ...

    def run_all(self, works: Sequence[Work]) -> list[Outcome[dict[str, Tensor]]]:
        """Make the steps of several clients; a client that fails gets its error, and nobody else does.

        The outcomes are the model's tensors afterwards, in the shapes and on the CPU as they came.
        """
        ...


def alone(job: Jobs[T], executor: Executor) -> T:
    """Run one client's job."""
    return together([job], executor.run_all)[0].result()


@contextlib.contextmanager
def training(model: Any, checkpointing: bool) -> Iterator[None]:
    """Put the model into training mode, with activations recomputed if asked, and back again."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()


def optimizer(groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]], train: TrainSettings) -> Any:
    """Return the optimiser of parameters, each group with its learning rate, in the fused form where that one trains.

    PyTorch's fused SGD leaves most 16-bit numbers on a CPU as they were (2.13).
    """
    described = [{"params": list(parameters), "lr": rate} for parameters, rate in groups]
    if train.optimizer == "sgd":
        fused = not any(p.device.type == "cpu" and p.element_size() == 2 for ps, _ in groups for p in ps)
        return torch.optim.SGD(described, lr=groups[0][1], weight_decay=train.weight_decay, fused=fused)
    return torch.optim.AdamW(
        described,
        lr=groups[0][1],
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
        fused=True,
    )


def place(adapted: AdaptedModel, start: Tensors, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """Load tensors into the model; switch gradients on for what is trained, and off for the rest."""
    adapted.load(start)
    wanted = set(names)
    slots = {**adapted.slots, **adapted.sides.parameters()}
    for name, parameter in slots.items():
        parameter.grad = None
        parameter.requires_grad_(name in wanted)
    return {name: slots[name] for name in names}


def rehearse(adapted: AdaptedModel, limits: Limits, *, exact: bool) -> None:
    """Take one step's gradient on a short text, as training will, and leave nothing of it.

    Raises:
        ModelError: this model cannot be trained with this adapter; before anything was.
    """
    _rows_have_directions(adapted)
    base = inner(adapted.model)
    text = texts_for(base)[-1]
    chosen = place(adapted, to_tensors(adapted.layout), list(adapted.slots))
    try:
        with training(adapted.model, limits.checkpointing):
            backpropagate(adapted, Step([Example.labelled(text, 1)]), limits.tokens, exact=exact)
        # a gradient of zeros has reached it, and is what some weights give
        reached = any(p.grad is not None for p in chosen.values())
        broken = [n for n, p in chosen.items() if p.grad is not None and not p.grad.isfinite().all()]
    except ModelError:
        raise
    except Exception as err:  # whatever a model's own code raises
        raise ModelError(
            f"{adapted.base.name} cannot be trained with this adapter: {type(err).__name__}: {err}; "
            "name other layers in lora.target_modules"
        ) from err
    finally:
        for parameter in chosen.values():
            parameter.grad = None
    if not reached:
        raise ModelError(f"{adapted.base.name} cannot be trained: no gradient reaches the adapter")
    if broken:
        what = f"the gradient of {broken[0]} has NaN or infinity"
        raise ModelError(
            f"{adapted.base.name} cannot be trained with this adapter: {what} ({len(broken)} of {len(chosen)} have)"
        )


def _rows_have_directions(adapted: AdaptedModel) -> None:
    """Refuse rows of zeros under DoRA, which has each as a magnitude times a direction. Raises ModelError."""
    for path, module in () if isinstance(adapted.layout, Plain) else adapted.layout.items():
        rows = [] if module.magnitude is None else torch.nonzero(module.magnitude == 0).flatten().tolist()
        if rows:
            what = f"row {rows[0]} of {path} is all zeros ({len(rows)} of {len(module.b)} rows are)"
            raise ModelError(
                f"{adapted.base.name} cannot be trained with DoRA: {what} and has no direction; "
                "set lora.dora = false, or leave the layer out of lora.target_modules"
            )


class Sequential:
    """One client after the other in PEFT's own layers: the reference that every other executor is tested against."""

    size = 1

    def __init__(self, adapted: AdaptedModel, limits: Limits | None = None) -> None:
        self._adapted = adapted
        self.limits = limits or Limits()

    def run_all(self, works: Sequence[Work]) -> list[Outcome[dict[str, Tensor]]]:
        """Make the steps of one client after the other."""
        return [attempted(lambda work=work: self.run(work)) for work in works]  # type: ignore[misc]

    def run(self, work: Work) -> dict[str, Tensor]:
        """Make one client's steps; return the model's tensors afterwards."""
        work.on_start()
        chosen = place(self._adapted, work.asked.start, work.asked.names)
        made = optimizer([(list(chosen.values()), work.rate)], work.settings)
        with training(self._adapted.model, self.limits.checkpointing):
            for number, examples in enumerate(work.steps):
                made.zero_grad(set_to_none=True)
                loss = backpropagate(self._adapted, work.step(number), self.limits.tokens, exact=work.exact)
                make_step(work.asked, chosen, list(chosen.values()), work.settings.max_grad_norm, made)
                work.on_step(examples, loss)
        return self._adapted.read(work.asked.start)
