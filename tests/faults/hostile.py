"""Hostile replies: everything one client can send instead of an update, seeded; and honest clients of every method."""

from __future__ import annotations

import io
import math
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtune.federation import messages
from fedtune.federation.private import PrivateStore
from fedtune.lora.state import AdapterState
from fedtune.methods import Algorithm
from tests.clients import fit_by

VALUES = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e20, 1e10, 9e3, 50.0, 1e-30, 1e-45, 0.0, -1.0)
COUNTS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 1e308, -1e308, 2**63, 10**400, -(10**400), 1e15, 7, 1)
TEXTS = ("", " \n\t", "[/data/3]", "\x1b[2J", "\ud83d", "\u202e", "x" * 100_000, "base_model.model.layer.q", "\0")
KINDS = (torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8)


@dataclass
class Toy:
    """A client's local work without a model: every training step is a small random move."""

    client: int
    round: int
    phase: int
    layout: AdapterState
    kept: dict[str, Tensor]
    rate: float = 0.1
    steps: int = 2
    draws: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.draws = torch.Generator().manual_seed(1000 * self.round + 10 * self.client + self.phase)

    def _noise(self, like: Tensor) -> Tensor:
        return (0.1 * torch.randn(like.shape, generator=self.draws)).to(like.dtype)

    def train(self, start: Any, names: Sequence[str], *more: Any, **_: Any) -> dict[str, Tensor]:
        correction = more[2] if len(more) > 2 else None
        for name in correction or ():
            correction.count(name, self._noise(start[name]))
        return {n: t + self._noise(t) if n in set(names) else t for n, t in start.items()}

    def gradients(self, at: Any, names: Sequence[str]) -> dict[str, Tensor]:
        return {n: self._noise(at[n]) for n in names}

    def features(self, count: int) -> Tensor:
        return self._noise(torch.zeros(count, 3))

    def row_norms(self, at: Any) -> dict[str, Tensor]:
        return {path: torch.ones(m.b.shape[0]) for path, m in self.layout.items()}

    def losses(self, step: int, points: Sequence[Any]) -> list[float]:
        return [float(self._noise(torch.zeros(()))) + 1 for _ in points]


def clients(
    algorithm: Algorithm, start: AdapterState, bad: int, mutate: Callable[[Message], Any], kind: type[Toy] = Toy
) -> ClientApp:
    """Return honest clients of any algorithm; what client `bad` would have sent goes through `mutate`."""
    app, private = ClientApp(), PrivateStore(None)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(str(context.node_config["partition-id"]))
        order = message.content.config_records[messages.ORDER]
        when = int(str(order["round"])), int(str(order["phase"]))
        local = kind(client, *when, algorithm.method.cut(start, client), private.load(client, when))
        fitted = fit_by(algorithm, local, messages.unpack(message.content.array_records[messages.ADAPTER]))
        private.save(client, when, fitted.kept)
        metrics = {"examples": 8.0, "tokens": 80.0, "steps": 2.0, "loss": 1.0}
        answer = messages.train_answer(order, fitted.payload, metrics, in_process=True)
        reply = Message(answer, reply_to=message)
        changed: Message = mutate(reply) if client == bad else reply
        return changed

    return app


def _header(shape: Any, kind: Any, body: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    try:
        np.lib.format.write_array_header_1_0(buffer, header)
    except ValueError:
        return b"\x93NUMPY\x01\x00\xff\xff" + repr(header).encode()
    return buffer.getvalue() + body


class Evil(dict[str, str]):
    """Something whose unpickling would be noticed."""

    unpickled = 0

    def __reduce__(self) -> Any:
        return _boom, ()


def _boom() -> None:
    Evil.unpickled += 1


def _bytes(draw: random.Random) -> bytes:
    body = draw.randbytes(draw.randrange(64))
    return draw.choice(
        [
            body,
            b"PK\x03\x04" + body,
            b"\x93NUMPY" + body,
            b"\x93NUMPY\x01\x00" + body,
            b"\x93NUMPY\x03\x00" + body,
            pickle.dumps(Evil()),
            _header((10**15,), "<f4"),
            _header((2**62, 2**62), "<f4"),
            _header((0, 10**15), "<f4"),
            _header((-1,), "<f4", body),
            _header((2, 3), "<f4", bytes(draw.randrange(30))),
            _header((1,), "|O", pickle.dumps(Evil())),
            _header((1,), "|V8", bytes(8)),
            _header((1,), "<U2", bytes(8)),
            _header((1,), [("a", "<f4")], bytes(4)),
            _header((True,) * 40, "<f4", bytes(4)),
            b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000,
        ]
    )


def _value(draw: random.Random, tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and kind with other numbers."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    noise = torch.randn(tensor.shape, generator=generator) * 10.0 ** draw.randrange(-40, 39)
    flat = torch.full(tensor.shape, draw.choice(VALUES))
    one = tensor.clone().float()
    if one.numel():
        one.view(-1)[draw.randrange(one.numel())] = draw.choice(VALUES)
    changed = draw.choice([noise, flat, one, tensor * draw.choice(VALUES), -tensor])
    return changed.to(tensor.dtype) if tensor.is_floating_point() else changed.nan_to_num(0, 9, -9).to(tensor.dtype)


def _shape(draw: random.Random, tensor: Tensor) -> Tensor:
    return draw.choice(
        [
            tensor.T if tensor.dim() == 2 else tensor[None],
            tensor[:1],
            tensor[:0],
            tensor.reshape(-1),
            tensor[..., None],
            torch.zeros((), dtype=tensor.dtype),
            torch.zeros(1, dtype=tensor.dtype).expand(10**9),
            torch.zeros(1, 1, dtype=tensor.dtype).expand(10**9, 3),
            torch.cat([tensor, tensor]) if tensor.dim() else tensor,
        ]
    )


def _kind(draw: random.Random, tensor: Tensor) -> Tensor:
    if draw.random() < 0.2:
        return torch.eye(3).to_sparse() if draw.random() < 0.5 else torch.empty(2, 3, device="meta")
    return tensor.to(draw.choice(KINDS))


def _tensors(draw: random.Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    change = draw.choice([_value, _value, _value, _shape, _kind])
    share = draw.choice([0.0, 0.5, 1.0])
    first = draw.choice(sorted(tensors)) if tensors else ""
    return {n: change(draw, t) if n == first or draw.random() < share else t for n, t in tensors.items()}


def _names(draw: random.Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = list(tensors)
    dropped = set(draw.sample(names, draw.randrange(len(names) + 1)))
    kept = {n: t for n, t in tensors.items() if n not in dropped}
    return {**kept, draw.choice(TEXTS): torch.ones(2)} if draw.random() < 0.5 else kept


def _record(draw: random.Random) -> Any:
    values = {draw.choice(["examples", "loss", "run", "round", "client", "x"]): draw.choice([1, 1.5, [1, 2], [1.0]])}
    return draw.choice([MetricRecord(values), ConfigRecord({**values, "y": "text"}), ArrayRecord()])


def _numbers(draw: random.Random) -> MetricRecord:
    return MetricRecord({n: draw.choice(COUNTS) for n in messages.REPORTED if draw.random() < 0.8})


def _identity(draw: random.Random, said: ConfigRecord) -> ConfigRecord:
    odd: list[Any] = [-1, 10**30, 1.0, True, "1", "run", b"\xff", [1], [1.0], *TEXTS]
    return ConfigRecord({k: draw.choice(odd) if draw.random() < 0.5 else v for k, v in said.items()})


def mutated(draw: random.Random, reply: Message) -> Any:
    """Return what a hostile client sends in place of its honest reply (or raise)."""
    content, how = reply.content, draw.randrange(14)
    tensors = messages.unpack(content.array_records[messages.ADAPTER])
    if how < 6:
        content[messages.ADAPTER] = messages.pack(_tensors(draw, tensors), in_process=True)
    elif how == 6:
        content[messages.ADAPTER] = messages.pack(_names(draw, tensors), in_process=True)
    elif how == 7:
        arrays = {n: Array("float32", (1,), draw.choice(["numpy.ndarray", "x"]), _bytes(draw)) for n in tensors}
        content[messages.ADAPTER] = ArrayRecord(arrays)
    elif how == 8:
        content[messages.METRICS] = _numbers(draw)
    elif how == 9:
        content[messages.IDENTITY] = _identity(draw, content.config_records[messages.IDENTITY])
    elif how == 10:
        name = draw.choice(list(content))
        content.pop(name)
        content[name] = _record(draw)
    elif how == 11:
        content.pop(draw.choice(list(content)))
    elif how == 12:
        return draw.choice([None, 3, Message(Error(5, draw.choice(TEXTS)), reply_to=reply), RecordDict()])
    else:
        raise draw.choice([RuntimeError, MemoryError, SystemExit, RecursionError, KeyError])(draw.choice(TEXTS))
    return reply
