"""One item that raises costs itself alone: what the items beside it and after it give does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from fedtune.types import FedtuneError

R = TypeVar("R")
Ask = Callable[[int, int], Iterator[list[R]]]


@dataclass(frozen=True)
class Failed:
    """What stands for the result of an item that raised, even when it was asked alone."""

    text: str


def _asked(ask: Ask[R], first: int, last: int) -> tuple[list[R], Exception | None]:
    """Return what comes of some items, up to the error there is."""
    found: list[R] = []
    try:
        for batch in ask(first, last):
            found += batch
    except FedtuneError:
        raise
    except Exception as err:
        return found, err
    return found, None


def _window(ask: Ask[R], first: int, last: int) -> list[R | Failed]:
    """Ask one batch again, by itself; then, if it fails again, its items one by one."""
    together, error = _asked(ask, first, last)
    if error is None:
        return [*together]
    results: list[R | Failed] = []
    for place in range(first, last):
        alone, error = _asked(ask, place, place + 1)
        results += [Failed(f"{type(error).__name__}: {error}")] if error else alone
    return results


def batches(ask: Ask[R], first: int, count: int, size: int) -> Iterator[list[R | Failed]]:
    """Yield the results of items first..count-1 in order; a batch that raises is asked again, then item by item.

    The batches after it are those they would have been: in the official evaluation a batch's other items decide a
    score too (by padding, and by the first answer's length), so only the items of a batch that fails twice are ever
    evaluated without them.

    Args:
        ask: yields the results of items from a first to before a last one, batch after batch.
        first: where to begin, a multiple of `size`.

    Raises:
        FedtuneError: what a user can repair is nothing about one item. Cancelling passes as well.
    """
    while first < count:
        try:
            for batch in ask(first, count):
                yield [*batch]
                first += len(batch)
        except FedtuneError:
            raise
        except Exception:
            last = min(first + size, count)
            yield _window(ask, first, last)
            first = last
