"""The state of an adapter, apart from any model: one `LoraModule` for each adapted layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.lora.algebra import wide
from fedtune.names import PREFIX, A, B, M
from fedtune.types import AdapterError, derive_seed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer: dW = s B A with B [out, r], A [r, in] and s = alpha/r (alpha/sqrt(r) for rsLoRA).

    Attributes:
        a: [r, in].
        b: [out, r].
        alpha: the numerator of the scale.
        rslora: rank-stabilised scale (arXiv 2312.03732).
        magnitude: DoRA's m [out] (arXiv 2402.09353), or None.
        conv1d: the layer stores its weight as [in, out] (GPT-2's Conv1D): `delta` is transposed for it.
    """

    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None
    conv1d: bool = False

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        """The scale s."""
        return self.scale_at(self.rank)

    def scale_at(self, rank: int) -> float:
        """Return the scale that the same alpha has at another rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def delta(self) -> Tensor:
        """Return s B A in float32 or better, in the orientation of the weight it is added to."""
        dense = self.scale * (wide(self.b) @ wide(self.a))
        return dense.T if self.conv1d else dense


AdapterState = Mapping[str, LoraModule]


@dataclass(frozen=True, eq=False)
class Plain(Mapping[str, LoraModule]):
    """A state that is not made of factors: named tensors, of any shapes and dtypes.

    It stands where an adapter stands, and has no layer with a product: asked for one, it says so.

    Attributes:
        space: what its tensors are, by the name of a space.
        tensors: by the names they have in messages and files.
        dtypes: in which dtypes they are sent, by name; in their own where it says nothing.
    """

    space: str
    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    @cached_property
    def sent(self) -> dict[str, Tensor]:
        """The tensors as they are sent, and as the model has them."""
        return {name: t.to(self.dtypes.get(name, t.dtype)) for name, t in self.tensors.items()}

    def _refused(self) -> AdapterError:
        return AdapterError(f"{self.space}: its tensors are no low-rank factors, so there is no layer with a product")

    def __getitem__(self, path: str) -> LoraModule:
        raise self._refused()

    def __iter__(self) -> Iterator[str]:
        raise self._refused()

    def __len__(self) -> int:
        raise self._refused()


def to_tensors(adapter: AdapterState) -> dict[str, Tensor]:
    """Return a state's tensors by name; an adapter's under the names of PEFT's `adapter_model.safetensors`."""
    if isinstance(adapter, Plain):
        return dict(adapter.tensors)
    tensors: dict[str, Tensor] = {}
    for path, module in adapter.items():
        tensors[PREFIX + path + A] = module.a
        tensors[PREFIX + path + B] = module.b
        if module.magnitude is not None:
            tensors[PREFIX + path + M] = module.magnitude
    return tensors


def with_tensors(like: AdapterState, tensors: Mapping[str, Tensor]) -> AdapterState:
    """Return `like` with its tensors replaced. Raises AdapterError for a name that is missing or unknown."""
    names = to_tensors(like)
    if set(names) != set(tensors):
        others = sorted(set(names) ^ set(tensors))[:3]
        raise AdapterError(f"the adapter's tensors are not those expected; first that differ: {', '.join(others)}")
    if isinstance(like, Plain):
        return replace(like, tensors={name: tensors[name] for name in like.tensors})
    return {
        path: replace(
            module,
            a=tensors[PREFIX + path + A],
            b=tensors[PREFIX + path + B],
            magnitude=None if module.magnitude is None else tensors[PREFIX + path + M],
        )
        for path, module in like.items()
    }


def as_kept(adapter: AdapterState) -> AdapterState:
    """Return a state as a server keeps it: weights in float32 or better, so that changes below their spacing add up."""
    if not isinstance(adapter, Plain):
        return adapter
    dtypes = {name: t.dtype for name, t in adapter.tensors.items() if t.is_floating_point()}
    return replace(adapter, tensors={**adapter.tensors, **{n: wide(adapter.tensors[n]) for n in dtypes}}, dtypes=dtypes)


def as_sent(adapter: AdapterState, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a message, those that a state keeps wider than they are sent in the dtype of the model."""
    if not isinstance(adapter, Plain):
        return dict(tensors)
    own, sent = adapter.tensors, adapter.sent
    return {n: t if n not in own else sent[n] if t is own[n] else t.to(sent[n].dtype) for n, t in tensors.items()}


def received(adapter: AdapterState, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a client sent as the state moved by the same change: from what was sent, which was rounded, to it."""
    if not isinstance(adapter, Plain):
        return dict(tensors)
    own, sent = adapter.tensors, adapter.sent
    return {n: t if own.get(n) is sent.get(n) else t + (own[n] - sent[n]) for n, t in tensors.items()}


def parameters(adapter: AdapterState) -> int:
    """Return how many numbers a state has."""
    return sum(t.numel() for t in to_tensors(adapter).values())


def resized(module: LoraModule, rank: int) -> LoraModule:
    """Return a module of another rank with the same alpha; its factors are placeholders of zeros."""
    return replace(module, a=module.a.new_zeros(rank, module.a.shape[1]), b=module.b.new_zeros(module.b.shape[0], rank))


def with_rank(module: LoraModule, rank: int) -> LoraModule:
    """Return a module cut to its first `rank` components, or padded with zeros up to them.

    Alpha stays, so the scale changes with the rank; B takes up the difference, and what is kept of the delta is
    what it was.
    """
    new = resized(module, rank)
    kept = min(rank, module.rank)
    new.a[:kept] = module.a[:kept]
    new.b[:, :kept] = module.b[:, :kept] * (module.scale / new.scale)
    return new


def fresh(adapter: Mapping[str, LoraModule], seed: int, round_: int) -> AdapterState:
    """Return an adapter of the same shapes with a new random A and B = 0, the same wherever it is made.

    A is uniform within 1/sqrt(in), as PEFT draws it; each layer has a stream of its own, and the first rows of a larger
    rank are those of a smaller one.
    """
    made = {}
    for path, module in adapter.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "fresh", round_, path))
        bound = 1 / math.sqrt(module.a.shape[1])
        a = torch.rand(module.a.shape, generator=generator, dtype=torch.float64) * 2 * bound - bound
        made[path] = replace(module, a=a.to(module.a.dtype), b=torch.zeros_like(module.b))
    return made


def rescaled(module: LoraModule, like: LoraModule) -> LoraModule:
    """Return the same delta with another module's scale at this module's rank; B takes up the difference."""
    alpha = like.scale * (math.sqrt(module.rank) if like.rslora else module.rank)
    new = replace(module, alpha=alpha, rslora=like.rslora)
    return new if new.scale == module.scale else replace(new, b=module.b * (module.scale / new.scale))


def from_tensors(tensors: Mapping[str, Tensor], alpha: float) -> AdapterState:
    """Group tensors under PEFT's names into modules.

    Raises:
        AdapterError: a name that is not of a LoRA adapter, a factor without its other, or shapes that do not fit.
    """
    paths = sorted({n.removeprefix(PREFIX).removesuffix(end) for n in tensors for end in (A, B, M) if n.endswith(end)})
    known = {PREFIX + path + end for path in paths for end in (A, B, M)}
    wrong = sorted(set(tensors) - known) + [
        PREFIX + p + e for p in paths for e in (A, B) if PREFIX + p + e not in tensors
    ]
    if wrong or not paths:
        raise AdapterError(f"not the tensors of a LoRA adapter; unknown or missing: {', '.join(wrong[:3]) or 'all'}")
    state = {}
    for path in paths:
        a, b = tensors[PREFIX + path + A], tensors[PREFIX + path + B]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(f"{path}: A is {tuple(a.shape)} and B {tuple(b.shape)}; they do not multiply")
        state[path] = LoraModule(a, b, alpha, magnitude=tensors.get(PREFIX + path + M))
    return state


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of their own memory: nobody who holds the others can change them."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as a file takes them: contiguous, and none in the memory of another."""
    found: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if place in memory else tensor.contiguous()
        memory.add(place)
    return found
