"""How tests run the client half of a method: with one client, or with several in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from fedtune.methods.requests import Program, Request
from fedtune.training.client import LocalWork
from fedtune.training.executor import Executor, Sequential, alone
from fedtune.training.scheduler import together

T = TypeVar("T")


def asking(request: Request) -> Program[Any]:
    """A program that makes one request and returns its answer."""
    return (yield request)


def asked(work: LocalWork, request: Request) -> Any:
    """One client's answer to a request."""
    return alone(work.run(asking(request)), Sequential(work._adapted))


def ran(work: LocalWork, program: Program[T]) -> T:
    """What one client's program returns."""
    return alone(work.run(program), Sequential(work._adapted))


def all_asked(works: Sequence[LocalWork], requests: Sequence[Request], executor: Executor) -> list[Any]:
    """The answers of several clients whose requests an executor may do in one pass."""
    jobs = [work.run(asking(request)) for work, request in zip(works, requests, strict=True)]
    return [outcome.result() for outcome in together(jobs, executor.run_all)]
