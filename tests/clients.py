"""Runs the client half of a method on a stand-in client, whose methods are named after the requests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from fedtune.methods.requests import (
    ClientContext,
    Features,
    Fitted,
    Gradients,
    Losses,
    Program,
    Request,
    RowNorms,
    Train,
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
    try:
        request = next(program)
        while True:
            request = program.send(_answer(client, request))
    except StopIteration as done:
        result: T = done.value
        return result


def context_of(client: Any) -> ClientContext:
    """Return what a method knows of a stand-in."""
    known = {f.name: getattr(client, f.name) for f in fields(ClientContext)}
    return ClientContext(**known)


def fit_by(method: Any, client: Any, start: Any) -> Fitted:
    """Return what a method, or a recipe, sends and keeps after a stand-in's work."""
    result: Fitted = ran_by(client, method.fit(context_of(client), start))
    return result
