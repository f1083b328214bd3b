"""Runs the client half of a method on a stand-in client, whose methods are named after the requests."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from fedtune.lora.state import AdapterState
from fedtune.methods import Algorithm, ClientUpdate, Method, ServerState
from fedtune.methods.requests import (
    ClientContext,
    Features,
    Fitted,
    Gradients,
    Losses,
    Program,
    Request,
    RowNorms,
    Tensors,
    Train,
    answered,
)

T = TypeVar("T")


def _answer(client: Any, request: Request) -> Any:
    match request:
        case Train(start, names, term, masks, correction):
            return client.train(start, names, term, masks, correction)
        case Gradients(at, names):
            return client.gradients(at, names)
        case Losses(step, points):
            return client.losses(step, points)
        case Features(count):
            return client.features(count)
        case RowNorms(at):
            return client.row_norms(at)


def ran_by(client: Any, program: Program[T]) -> T:
    """Return what a program returns whose requests the stand-in has answered."""
    return answered(program, partial(_answer, client))


def context_of(client: Any) -> ClientContext:
    """Return what a method knows of a stand-in."""
    known = {f.name: getattr(client, f.name) for f in fields(ClientContext)}
    return ClientContext(**known)


def fit_by(method: Method | Algorithm, client: Any, start: Any) -> Fitted:
    """Return what a method, or an algorithm, sends and keeps after a stand-in's work."""
    work = method.work if isinstance(method, Algorithm) else method.fit
    return ran_by(client, work(context_of(client), start))


def begun_by(
    method: Method | Algorithm, layout: AdapterState, download: Tensors, kept: Tensors, round_: int
) -> dict[str, Tensor]:
    """Return all tensors of a client's model at the start of a round."""
    return method.begin(ClientContext(0, round_, 1, layout, kept, rate=0.1, steps=1), download)


def completed(method: Method, update: ClientUpdate, state: ServerState) -> AdapterState:
    """Return an update of the round after a state's as a whole adapter."""
    return method.adapters([update], state, state.round + 1)[0]
