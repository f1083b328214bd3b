"""Between adapter tensors and Flower's messages.

In one process nothing is serialised: a `TensorArray` carries the tensor itself and makes its bytes only if
somebody asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedtune.privacy.screen import Reply

ADAPTER, METRICS, IDENTITY, ORDER = "adapter", "metrics", "identity", "order"


class TensorArray(Array):
    """A Flower array that keeps its tensor. For use inside one process; never sent over a wire."""

    tensor: Tensor
    stype = "numpy.ndarray"

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__["tensor"] = (
            tensor  # Array watches its attributes, which costs more than all the rest of a message
        )

    @property
    def dtype(self) -> str:  # type: ignore[override]  # made when asked for, as are the bytes
        """The tensor's dtype, as NumPy names it."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @cached_property
    def data(self) -> bytes:  # type: ignore[override]  # lazily what Array has eagerly
        """The bytes Flower would send."""
        buffer = BytesIO()
        np.save(buffer, self.tensor.numpy(), allow_pickle=False)
        return buffer.getvalue()


def pack(tensors: Mapping[str, Tensor], *, in_process: bool) -> ArrayRecord:
    """Put tensors into a record, by reference inside one process."""
    if in_process:
        record = ArrayRecord()  # given a dictionary it would copy every array, through its bytes
        for name, tensor in tensors.items():
            record[name] = TensorArray(tensor)
        return record
    return ArrayRecord({name: Array(t.detach().cpu().contiguous().numpy()) for name, t in tensors.items()})


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """Take tensors out of a record (NumPy bytes without pickle, or the tensors themselves)."""
    return {
        name: a.tensor if isinstance(a, TensorArray) else torch.from_numpy(a.numpy().copy())
        for name, a in record.items()
    }


def is_in_process(record: ArrayRecord) -> bool:
    """Tell whether a record carries tensors by reference, so that the answer may too."""
    return any(isinstance(a, TensorArray) for a in record.values())


def train_order(run: str, when: tuple[int, int], client: int, adapter: ArrayRecord) -> RecordDict:
    """Build what a client is sent for one exchange: (round, exchange of the round, from 1)."""
    return RecordDict(
        {
            ADAPTER: adapter,
            ORDER: ConfigRecord({"run": run, "round": when[0], "phase": when[1], "client": client}),
        }
    )


def train_answer(
    order: ConfigRecord, tensors: Mapping[str, Tensor], metrics: Mapping[str, float], *, in_process: bool
) -> RecordDict:
    """Build what a client sends back."""
    return RecordDict(
        {
            ADAPTER: pack(tensors, in_process=in_process),
            METRICS: MetricRecord(dict(metrics)),
            IDENTITY: ConfigRecord({key: order[key] for key in ("run", "round", "phase", "client")}),
        }
    )


def _metrics(content: RecordDict) -> dict[str, float]:
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        return {}
    return {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}


def _claims(content: RecordDict) -> tuple[str, int, int, int] | None:
    identity: Any = content.get(IDENTITY)
    try:
        return str(identity["run"]), int(identity["round"]), int(identity["client"]), int(identity["phase"])
    except (TypeError, KeyError, ValueError):
        return None


def read_reply(message: Message, clients: Mapping[int, int]) -> Reply:
    """Decode a reply without trusting it.

    Args:
        message: what came.
        clients: node id -> client, of all nodes known.
    """
    client = clients.get(message.metadata.src_node_id)
    if message.has_error():
        return Reply(client, None, None, {}, message.error.reason or f"error {message.error.code}")
    content = message.content
    arrays = content.get(ADAPTER)
    try:
        tensors = unpack(arrays) if isinstance(arrays, ArrayRecord) else None
    except (ValueError, TypeError, EOFError) as err:
        return Reply(client, _claims(content), None, {"loss": math.nan}, f"unreadable arrays: {err}")
    return Reply(client, _claims(content), tensors, _metrics(content))
