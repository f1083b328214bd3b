"""Run the first rounds of a submission again and compare them with what it says of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedtune.config.load import read_toml
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.run import run
from fedtune.io import only_files, read_lines
from fedtune.settings import load
from fedtune.types import CancelledError, CorruptFileError, RoundRecord, counted

# another processor or another version sums in another order; a different run differs in the first digit
TOLERANCE = 0.02


class _EnoughError(CancelledError):
    """The rounds that were asked for are run."""


class _Enough(Reporter):
    """Stops a run after some rounds."""

    def __init__(self, rounds: int, watch: Reporter) -> None:
        self._rounds, self._watch = rounds, watch

    def training(self, arm: str, rounds: int, done: int) -> None:
        self._watch.training(arm, self._rounds, done)

    def round(self, record: RoundRecord) -> None:
        self._watch.round(record)
        if record.round >= self._rounds:
            raise _EnoughError(0)


def _same_loss(one: float | None, two: float | None) -> bool:
    """Tell whether two losses are the same within 2 %; a loss that nobody reported is only the same as another such."""
    if one is None or two is None:
        return one is two
    return math.isclose(one, two, rel_tol=TOLERANCE)


def _client(number: int, one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a client did differently in a round."""
    where = f"round {number}: client {one['client']}"
    for key in ("examples", "steps"):
        if one[key] != two[key]:
            yield f"{where} had {one[key]} {key}, has {two[key]}"
    if not _same_loss(one["loss"], two["loss"]):
        yield f"{where} had loss {_shown(one['loss'])}, has {_shown(two['loss'])}"


def _shown(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def differences(said: Sequence[dict[str, Any]], done: Sequence[dict[str, Any]]) -> list[str]:
    """Return what two runs' rounds differ in: cohort, clients, examples, steps, bytes exactly; losses within 2 %.

    Raises:
        CorruptFileError: what is said is no record of rounds.
    """
    found = [] if len(said) == len(done) else [f"{counted(len(said), 'round')} to be run again, {len(done)} ended"]
    try:
        for one, two in zip(said, done, strict=False):
            pairs = [(key, one[key], two[key]) for key in ("cohort", "status", "bytes_up", "bytes_down")]
            pairs.append(("clients used", [c["client"] for c in one["clients"]], [c["client"] for c in two["clients"]]))
            found += [f"round {one['round']}: {key} was {a}, is {b}" for key, a, b in pairs if a != b]
            for a, b in zip(one["clients"], two["clients"], strict=False):
                if a["client"] == b["client"]:
                    found += _client(one["round"], a, b)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CorruptFileError(f"rounds.jsonl is no record of rounds ({type(err).__name__}: {err})") from err
    return found


def verify(packed: Path, rounds: int, data: str = "", watch: Reporter = Reporter()) -> list[str]:
    """Replay the first rounds of a packed run, and return what differs.

    Args:
        packed: a folder with `config.toml` and `rounds.jsonl`.
        rounds: how many.
        data: the folder of training files, where the run read one; a submission does not say where that was.
        watch: progress.

    Raises:
        FedtuneError: the run cannot be made here.
    """
    only_files(packed)
    tree = read_toml(packed / "config.toml")
    load([tree], here=False)  # a table may be no table: that is said before another layer lies over it
    changes: dict[str, Any] = {"eval": {"base": False}} | ({"data": {"path": data}} if data else {})
    said = read_lines(packed / "rounds.jsonl")[:rounds]
    if not said:
        raise CorruptFileError(f"{packed / 'rounds.jsonl'}: has no rounds that could be run again")
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        with contextlib.suppress(_EnoughError):
            run(load([tree, changes], kept=True), out, reporter=_Enough(len(said), watch))
        return differences(said, read_lines(out / "rounds.jsonl")[: len(said)])
