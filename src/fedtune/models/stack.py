"""Several clients' adapters side by side over one base model: each client's tokens pass through its own.

The base model's layers see one row of all clients' tokens; beside each adapted layer, two batched products add
s_k B_k A_k x to the tokens of client k. All trained numbers of a client lie in one line of one matrix, so that clipping
and the optimiser are a few operations a client, whatever the number of layers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fedtune.models.adapted import AdaptedModel
from fedtune.models.kernels import gathered, spread
from fedtune.models.packing import PackingPlan, Span
from fedtune.names import PREFIX, A, B

Tensors = Mapping[str, Tensor]


class Stack:
    """The adapters of some clients, trained at the same time.

    Args:
        adapted: the resident model; its own adapter is left out meanwhile.
        starts: each client's factors; ranks may differ, and are padded with zeros, which have no gradient.
        names: of the tensors that are trained, the same for all.
    """

    def __init__(self, adapted: AdaptedModel, starts: Sequence[Tensors], names: Sequence[str]) -> None:
        self._adapted = adapted
        each = {n: [start[n].shape for start in starts] for n in adapted.slots}
        self._shapes = {n: torch.Size(map(max, zip(*shapes, strict=True))) for n, shapes in each.items()}
        self._count = len(starts)
        like = next(iter(adapted.slots.values()))
        sizes = [self._shapes[n].numel() for n in names]
        self._ends = dict(zip(names, accumulate(sizes), strict=True))
        self.numbers = like.detach().new_zeros(self._count, sum(sizes))
        self.gradients = torch.zeros_like(self.numbers)
        # each client's line, as one parameter with its gradient
        self.lines = [self._leaf(self.numbers[k], self.gradients[k]) for k in range(self._count)]
        self._tensors = {n: self._stacked(n, starts) for n in adapted.slots}
        ranks = {path: [start[PREFIX + path + A].shape[0] for start in starts] for path in adapted.layout}
        scales = {path: [adapted.layout[path].scale_at(rank) for rank in each] for path, each in ranks.items()}
        self._scales = {path: self.numbers.new_tensor(each)[:, None, None] for path, each in scales.items()}
        self._plan: PackingPlan | None = None
        self._own: tuple[int, ...] = ()

    @staticmethod
    def _leaf(numbers: Tensor, gradient: Tensor) -> torch.nn.Parameter:
        leaf = torch.nn.Parameter(numbers)
        leaf.grad = gradient
        return leaf

    def _window(self, matrix: Tensor, name: str) -> Tensor:
        """Return the part of a matrix of lines that holds a tensor, as [clients, *shape]."""
        shape, end = self._shapes[name], self._ends[name]
        return matrix[:, end - shape.numel() : end].view(self._count, *shape)

    def _stacked(self, name: str, starts: Sequence[Tensors]) -> Tensor:
        trained = name in self._ends
        slot = self._window(self.numbers, name) if trained else self.numbers.new_zeros(self._count, *self._shapes[name])
        for k, start in enumerate(starts):
            slot[k][_corner(start[name])] = start[name].to(slot.device, slot.dtype)
        # gradients are added in place, into the matrix of lines
        return self._leaf(slot, self._window(self.gradients, name)) if trained else slot

    def slots(self, client: int, start: Tensors) -> dict[str, torch.nn.Parameter]:
        """Return one client's trained tensors in its own shapes, with their gradients, all in place."""
        found = {}
        for name in self._ends:
            numbers, gradients = self._window(self.numbers, name)[client], self._window(self.gradients, name)[client]
            part = _corner(start[name])
            found[name] = self._leaf(numbers[part], gradients[part])
        return found

    def read(self, client: int, start: Tensors) -> dict[str, Tensor]:
        """Return copies on the CPU of one client's tensors as they are now, in the shapes they came in."""
        found = dict(start)
        for name, stacked in self._tensors.items():
            own = stacked.detach()[client][_corner(start[name])]
            found[name] = own.to("cpu", copy=True).contiguous()
        return found

    def rows(self, clients: Sequence[int], lengths: Sequence[int]) -> None:
        """Say whose the tokens of the next pass are: some clients, and how many tokens each has, as they stand."""
        places = [0, *accumulate(lengths)]
        spans = [Span(start, end) for start, end in pairwise(places)]
        self._own = tuple(clients)
        self._plan = PackingPlan(spans, self.numbers.device, together=True)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the stacked adapters stand in for the model's own."""
        with contextlib.ExitStack() as during:
            # gradients go into the matrix of lines, which is not autograd's own layout
            during.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            for path, layer in self._adapted.layers.items():
                during.enter_context(layer.register_forward_hook(self._hook(path, layer), prepend=True))
            during.enter_context(self._adapted.model.disable_adapter())
            during.callback(setattr, self, "_plan", None)
            yield

    def _hook(self, path: str, layer: Any) -> Any:
        a, b, scale = self._tensors[PREFIX + path + A], self._tensors[PREFIX + path + B], self._scales[path]
        drop = layer.lora_dropout["default"]

        def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            plan = self._plan
            if plan is None:
                return output
            own = slice(None) if len(self._own) == self._count else list(self._own)
            x = spread(drop(inputs[0].to(a.dtype))[0], plan)
            x = x.view(len(self._own), plan.batches[0].length, -1)
            added = torch.bmm(torch.bmm(x, a[own].mT), b[own].mT) * scale[own]
            return (output + gathered(added.flatten(0, 1), plan)[None]).to(output.dtype)

        return add


def _corner(like: Tensor) -> tuple[slice, ...]:
    """Return the part of a padded tensor that holds one of its own shape."""
    return tuple(slice(n) for n in like.shape)
