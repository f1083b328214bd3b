"""Several clients in one forward and one backward pass, with stacked adapters: the numbers of one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedtune.lora.state import to_tensors
from fedtune.methods.requests import Tensors
from fedtune.models.adapted import AdaptedModel
from fedtune.models.interface import inner, remembered
from fedtune.models.proof import COARSE_GRADIENT, far, proof_of, texts_for
from fedtune.models.stack import Stack
from fedtune.names import BASE, M, is_side
from fedtune.objectives import Example
from fedtune.training.executor import Limits, Sequential, Work, make_step, optimizer, place, training
from fedtune.training.gradients import backpropagate, one_pass
from fedtune.training.loss import Part, Step, passes
from fedtune.training.scheduler import Outcome, attempted
from fedtune.types import last_line

_log = logging.getLogger(__name__)


def _stacked_gradients(adapted: AdaptedModel, starts: Sequence[Tensors], examples: Sequence[Example]) -> list[Tensors]:
    """Return each client's gradients on one example of its own, from one pass."""
    stack = Stack(adapted, starts, list(adapted.slots))
    slots = [stack.slots(k, start) for k, start in enumerate(starts)]
    parts = [Part([example], 1.0 / example.labels) for example in examples]
    with training(adapted.model, False), stack.active():
        one_pass(adapted, parts, exact=True, on_rows=partial(stack.rows, range(len(parts))))
    return [{n: p.grad for n, p in own.items() if p.grad is not None} for own in slots]


def _own_gradients(adapted: AdaptedModel, start: Tensors, example: Example) -> Tensors:
    """Return the same of one client, in PEFT's own layers."""
    chosen = place(adapted, start, list(adapted.slots))
    with training(adapted.model, False):
        backpropagate(adapted, Step([example]), example.tokens, exact=True)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in chosen.items()}


def _tried(adapted: AdaptedModel) -> bool:
    base = inner(adapted.model)
    examples = [Example.labelled(text, 1) for text in texts_for(base)[1:]]
    generator = torch.Generator().manual_seed(0)
    layout = to_tensors(adapted.layout)
    starts = [{n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in layout.items()} for _ in examples]
    try:
        own = [_own_gradients(adapted, start, example) for start, example in zip(starts, examples, strict=True)]
        made = _stacked_gradients(adapted, starts, examples)
    except Exception:  # whatever a model's own code raises, it cannot do this
        return False
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    lines = ((m[n].cpu().view(1, -1), o[n].cpu().view(1, -1)) for m, o in zip(made, own, strict=True) for n in o)
    return not any(far(one, other, dtype, COARSE_GRADIENT) for one, other in lines)


def stacks(adapted: AdaptedModel) -> bool:
    """Tell whether adapters side by side give each client the gradients that it has alone; tried out once."""
    return remembered(adapted.model, "fedtune_stacks", lambda: _tried(adapted))


class Cohort:
    """Trains up to `size` clients at a time; what cannot be stacked is trained one after the other, by the same steps.

    Not stacked are states that are no factors, DoRA (its norms need each client's whole weights), and side tensors
    that are trained or differ.

    Args:
        adapted: the resident model.
        size: clients in a pass, 1 or more.
        limits: what fits; the tokens are those of all clients in a pass.
    """

    def __init__(self, adapted: AdaptedModel, size: int, limits: Limits | None = None) -> None:
        self._adapted = adapted
        self._one = Sequential(adapted, limits)
        self.limits = self._one.limits
        self.size = size
        self.stacked = 0

    def run_all(self, works: Sequence[Work]) -> list[Outcome[dict[str, Tensor]]]:
        """Make the steps of several clients; a client that fails alone gets its error alone."""
        found: dict[int, Outcome[dict[str, Tensor]]] = {}
        for places in self._groups(works):
            found |= zip(places, self._group([works[i] for i in places]), strict=True)
        return [found[i] for i in range(len(works))]

    def _group(self, works: Sequence[Work]) -> list[Outcome[dict[str, Tensor]]]:
        """Make the steps of a group; one that fails (of memory, or of a client's own) is tried again by halves."""
        if len(works) == 1 or not stacks(self._adapted):
            return self._one.run_all(works)
        made = attempted(lambda: list(self._stacked(works)))
        if made.error is None:
            return [Outcome(t, seconds=s) for t, s in zip(made.result(), _shares(works, made.seconds), strict=True)]
        _log.info("%d clients in one pass failed and are tried by halves: %s", len(works), last_line(str(made.error)))
        failed, made = made.seconds, Outcome()  # the error holds on to the tensors of the pass
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(works) // 2
        done = [*self._group(works[:half]), *self._group(works[half:])]
        return [replace(d, seconds=d.seconds + s) for d, s in zip(done, _shares(works, failed), strict=True)]

    def _groups(self, works: Sequence[Work]) -> list[list[int]]:
        """Return the places of works that go together, at most `size` at a time."""
        groups: list[list[int]] = []
        able = self._adapted.stackable
        joins = [able and _stackable(work) and _together(self._adapted.model, work) for work in works]
        for i, work in enumerate(works):
            fitting = (g for g in groups if joins[g[0]] and len(g) < self.size and _alike(works[g[0]], work))
            group = next(fitting, None) if joins[i] else None
            if group is None:
                groups.append([i])
            else:
                group.append(i)
        return groups

    def _stacked(self, works: Sequence[Work]) -> Iterable[dict[str, Tensor]]:
        """Make the steps of some clients, one step of each in a pass; who has fewer is done earlier."""
        adapted, first = self._adapted, works[0]
        for work in works:
            work.on_start()
        adapted.sides.load({n: t for n, t in first.asked.start.items() if is_side(n)}, adapted.device)
        factors = [{n: t for n, t in w.asked.start.items() if not is_side(n)} for w in works]
        stack = Stack(adapted, factors, first.asked.names)
        slots = [stack.slots(k, start) for k, start in enumerate(factors)]
        # each client has an optimiser of its own: only then may rates and even optimisers differ
        made = [optimizer([([line], w.rate)], w.settings) for line, w in zip(stack.lines, works, strict=True)]
        with training(adapted.model, self.limits.checkpointing), stack.active():
            for number in range(max(len(w.steps) for w in works)):
                stack.gradients.zero_()
                for k, loss in self._passes(stack, works, number).items():
                    make_step(works[k].asked, slots[k], [stack.lines[k]], works[k].settings.max_grad_norm, made[k])
                    works[k].on_step(works[k].steps[number], loss)
        self.stacked += len(works)
        return [stack.read(k, w.asked.start) for k, w in enumerate(works)]

    def _passes(self, stack: Stack, works: Sequence[Work], number: int) -> dict[int, float]:
        """Backpropagate one step of every client that has one left; return their losses."""
        going = [k for k, w in enumerate(works) if number < len(w.steps)]
        losses = dict.fromkeys(going, 0.0)
        for parts in passes([works[k].step(number) for k in going], self.limits.tokens):
            clients = [going[place] for place in parts]
            on_rows = partial(stack.rows, clients)
            own = one_pass(self._adapted, list(parts.values()), exact=works[0].exact, on_rows=on_rows)
            for client, value in zip(clients, own, strict=True):
                losses[client] += value
        return losses


def _shares(works: Sequence[Work], seconds: float) -> list[float]:
    """Return each work's share of the seconds they took at once, by its tokens: long texts take nobody else's time."""
    tokens = [sum(example.tokens for step in work.steps for example in step) for work in works]
    each = seconds / max(1, sum(tokens))
    return [each * count for count in tokens]


def _fixed(work: Work) -> dict[str, Tensor]:
    return {n: t for n, t in work.asked.start.items() if is_side(n)}


def _together(model: Any, work: Work) -> bool:
    """Tell whether a client's texts may lie in one row with others', with nothing random but what is keyed.

    They need not where the objective needs the log-probabilities of all of them before any loss.
    """
    if work.objective.whole_step:
        return False
    found, examples = proof_of(model), [example for step in work.steps for example in step]
    return not found.random and found.packs([text.ids for example in examples for text in example.texts])


def _stackable(work: Work) -> bool:
    """Tell whether a work is plain LoRA over a base that may have been moved, in a way that acts on every row alike."""
    moved = all(n.endswith(BASE) and n not in work.asked.names for n in _fixed(work))
    return moved and not any(M in n for n in work.asked.start)


def _alike(one: Work, other: Work) -> bool:
    """Tell whether two works that can be stacked go together: the same tensors trained, over the same base."""
    mine, theirs = _fixed(one), _fixed(other)
    same = (list(one.asked.names), one.exact, mine.keys()) == (list(other.asked.names), other.exact, theirs.keys())
    return same and all(torch.equal(t, theirs[n]) for n, t in mine.items())
