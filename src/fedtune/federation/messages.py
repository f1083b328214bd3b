"""Between adapter tensors and Flower's messages.

In one process nothing is serialised: a `TensorArray` carries the tensor itself and makes its bytes only if
somebody asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedtune.federation.reply import Reply
from fedtune.models.budget import message_bytes, wire_dtype
from fedtune.types import last_line, plain

ADAPTER, METRICS, IDENTITY, ORDER = "adapter", "metrics", "identity", "order"
NUMBERS = "biuf"  # NumPy's kinds: bool, integers, floating point
# code of the error that a grid puts in the place of what is no reply to its message; Flower's own are far below
FALSE_REPLY = 1001
REPORTED = ("examples", "tokens", "steps", "loss")


def _numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's numbers as NumPy's; those of bfloat16 as their bits."""
    plain = tensor.detach().cpu().contiguous()
    found: np.ndarray[Any, Any] = (plain.view(torch.uint16) if plain.dtype == torch.bfloat16 else plain).numpy()
    return found


def _array(tensor: Tensor) -> Array:
    """Return a tensor as Flower sends it; bfloat16 is said in `dtype`, as NumPy's own header cannot."""
    array = Array(_numbers(tensor))
    return replace(array, dtype="bfloat16") if tensor.dtype == torch.bfloat16 else array


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
        np.save(buffer, _numbers(self.tensor), allow_pickle=False)
        return buffer.getvalue()


def pack(tensors: Mapping[str, Tensor], *, in_process: bool) -> ArrayRecord:
    """Put tensors into a record, by reference inside one process: whoever keeps them sends copies."""
    if in_process:
        record = ArrayRecord()  # given a dictionary it would copy every array, through its bytes
        for name, tensor in tensors.items():
            record[name] = TensorArray(tensor)
        return record
    return ArrayRecord({name: _array(t) for name, t in tensors.items()})


def _decoded(array: Array) -> Tensor:
    """Return the tensor of a client's array; its bytes are read as plain numbers and in no other way.

    Raises:
        ValueError: the bytes are no array of numbers, or not as many as their header announces (nothing is allocated
            for what is only announced).
    """
    if isinstance(array, TensorArray):
        tensor = array.tensor
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_nested:
            raise ValueError(
                f"an array of type {type(tensor).__name__}, nested or not torch's own; must be plain numbers"
            )
        if tensor.layout != torch.strided or tensor.is_meta or wire_dtype(tensor.dtype).kind not in NUMBERS:
            raise ValueError(f"an array of {array.dtype}, {tensor.layout}; must be plain numbers")
        return tensor
    data = array.data
    if array.stype != TensorArray.stype or not isinstance(data, bytes):
        raise ValueError(f"an array of type {array.stype!r}; must be {TensorArray.stype!r}")
    buffer = BytesIO(data)
    version = np.lib.format.read_magic(buffer)
    if version != (1, 0):
        raise ValueError(f"an array in NumPy's format {version}; must be (1, 0)")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(buffer)
    if dtype.hasobject or dtype.kind not in NUMBERS:
        raise ValueError(f"an array of {dtype}; must be of numbers")
    start, count = buffer.tell(), math.prod(shape)
    if min(shape, default=0) < 0 or len(data) - start != count * dtype.itemsize:
        raise ValueError(f"an array of {shape} {dtype} in {len(data) - start} bytes")
    numbers = np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if by_column else "C")
    found = torch.from_numpy(numbers.astype(dtype.newbyteorder("="), order="C"))
    return found.view(torch.bfloat16) if array.dtype == "bfloat16" and found.dtype == torch.uint16 else found


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """Take tensors out of a record (NumPy bytes without pickle, or the tensors themselves).

    Raises:
        ValueError: an array is not one of numbers, or damaged; with its name.
    """
    tensors = {}
    for name, array in record.items():
        try:
            tensors[name] = _decoded(array)
        except Exception as err:  # whatever a forged header makes NumPy raise
            raise ValueError(f"{last_line(name, 100)}: {type(err).__name__}: {last_line(str(err))}") from err
    return tensors


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
    order: ConfigRecord, tensors: Mapping[str, Tensor], reported: Mapping[str, float], *, in_process: bool
) -> RecordDict:
    """Build what a client sends back."""
    return RecordDict(
        {
            ADAPTER: pack(tensors, in_process=in_process),
            METRICS: MetricRecord(dict(reported)),
            IDENTITY: ConfigRecord({key: order[key] for key in ("run", "round", "phase", "client")}),
        }
    )


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def metrics(content: RecordDict) -> dict[str, float]:
    """Return the numbers a reply may report; what nobody asked for is left out, as is what is no number."""
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        return {}
    found = {name: _number(record.get(name)) for name in REPORTED}
    return {name: value for name, value in found.items() if value is not None}


def _claims(content: RecordDict) -> tuple[str, int, int, int] | None:
    identity = content.get(IDENTITY)
    if not isinstance(identity, ConfigRecord):
        return None
    run, *numbers = (identity.get(key) for key in ("run", "round", "client", "phase"))
    if not isinstance(run, str) or any(type(n) is not int for n in numbers):
        return None
    round_, client, phase = (int(str(n)) for n in numbers)
    return run, round_, client, phase


def read_reply(message: Message, clients: Mapping[int, int]) -> Reply:
    """Decode a reply without trusting it: whatever came, there is a `Reply`.

    Args:
        message: what came.
        clients: node id -> client, of all nodes known.
    """
    client = None
    try:
        client = clients.get(message.metadata.src_node_id)
        return _read(message, client)
    except Exception as err:  # of a client's making, so it is the client's fault and nobody else's
        problem = f"unreadable reply: {type(err).__name__}: {last_line(str(err))}"
        return Reply(client, None, None, {}, problem=problem)


def _held(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of tensors on the wire; of one that announces more numbers than it holds, what it holds."""
    return message_bytes(tensors) - sum(max(0, t.nbytes - t.untyped_storage().nbytes()) for t in tensors.values())


def _read(message: Message, client: int | None) -> Reply:
    if message.has_error() and message.error.code == FALSE_REPLY:
        return Reply(client, None, None, {}, problem=plain(str(message.error.reason)))
    if message.has_error():
        return Reply(client, None, None, {}, plain(str(message.error.reason or f"error {message.error.code}")))
    content = message.content
    arrays = content.get(ADAPTER)
    claims = _claims(content)
    try:
        tensors = unpack(arrays) if isinstance(arrays, ArrayRecord) else None
        size = _held(tensors or {})
    except Exception as err:
        return Reply(client, claims, None, {}, problem=f"unreadable arrays: {err}")
    return Reply(client, claims, tensors, metrics(content), bytes=size)
