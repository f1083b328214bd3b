"""What a run will need, said before it starts: bytes on the wire exactly, memory roughly."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.lora.state import parameters, to_tensors
from fedtune.models.adapted import AdaptedModel

# hidden-sized numbers that a layer keeps of a token for the backward pass
KEPT = 34


def wire_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the NumPy type a tensor's numbers travel in: bfloat16 as its 16 bits. Raises TypeError without one."""
    return np.dtype("uint16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))


@cache
def _header_bytes(shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
    """Length of the NumPy header Flower's serialisation puts before an array (128 for usual shapes)."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind.str, "fortran_order": False, "shape": shape})
    return buffer.tell()


def message_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of an adapter on the wire: for each tensor its numbers and one array header.

    The same count as FlowerTune's communication tracker: sum of 4 numel + 128 for float32.
    """
    return sum(t.nbytes + _header_bytes(tuple(t.shape), wire_dtype(t.dtype)) for t in tensors.values())


def activation_bytes(shape: Any, width: int, *, checkpointing: bool) -> int:
    """Return the bytes that training keeps of one token for the backward pass, roughly and rather too many.

    Args:
        shape: the text model's configuration.
        width: bytes of a number.
        checkpointing: only each layer's input is kept.
    """
    kept = 1 if checkpointing else KEPT
    return int(shape.hidden_size) * int(shape.num_hidden_layers) * kept * width


@dataclass(frozen=True)
class Budget:
    """The prediction.

    Attributes:
        message: bytes of one whole adapter on the wire.
        per_round: bytes of the first round, both directions, when nobody fails; None likewise.
        total: bytes of the whole run; None where they depend on its course.
        model: bytes of the resident base model.
        training: rough peak of training beside it (adapter, gradients, optimiser, activations).
        trainable: numbers that are trained.
    """

    message: int
    per_round: int | None
    total: int | None
    model: int
    training: int
    trainable: int


def predict(
    config: Config,
    adapted: AdaptedModel,
    longest: int | None = None,
    wire: Callable[[int], int] | None = None,
    *,
    tokens: int = 4096,
    checkpointing: bool = False,
) -> Budget:
    """Predict bytes (exactly) and memory (roughly) from the shapes.

    Args:
        config, adapted: the run's settings, and the model with its adapter.
        longest: tokens of the longest example, where known; `train.max_length` otherwise.
        wire: round -> bytes its cohort exchanges, both directions; None where nobody can say.
        tokens: of a pass, at most.
        checkpointing: activations are recomputed.
    """
    tensors = to_tensors(adapted.layout)
    message = message_bytes(tensors)
    shape = adapted.base.model.config.get_text_config()
    train = config.train
    tokens = min(tokens, train.per_device_train_batch_size * (longest or train.max_length))
    weights = list(adapted.base.model.parameters())
    width = max(p.element_size() for p in weights)
    activations = tokens * activation_bytes(shape, width, checkpointing=checkpointing)
    # the parameters, their gradients and two moments
    moved = 4 * sum(t.nbytes for t in tensors.values())
    each = [wire(t) for t in range(1, config.federation.rounds + 1)] if wire else []
    return Budget(
        message=message,
        per_round=each[0] if each else None,
        total=sum(each) if each else None,
        model=sum(p.nbytes for p in weights),
        training=moved + activations + tokens * shape.vocab_size * 4,
        trainable=parameters(adapted.layout),
    )
