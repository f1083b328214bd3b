"""Run the first rounds of a submission again and hold them against what it says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedtune.config import load
from fedtune.config.load import read_toml
from fedtune.experiment.report import Reporter
from fedtune.experiment.run import run
from fedtune.io import read_lines
from fedtune.types import CancelledError, RoundRecord

# another processor or another version sums in another order; a different run differs in the first digit
TOLERANCE = 0.02


class _Enough(Reporter):
    """Stops a run after some rounds."""

    CODE = 128

    def __init__(self, rounds: int, watch: Reporter) -> None:
        self._rounds, self._watch = rounds, watch

    def round(self, record: RoundRecord) -> None:
        self._watch.round(record)
        if record.round >= self._rounds:
            raise CancelledError(0)


def differences(said: Sequence[dict[str, Any]], done: Sequence[dict[str, Any]]) -> list[str]:
    """Return what two runs' rounds differ in: cohort, clients, examples, bytes exactly; losses within 2 %."""
    found = [] if len(said) == len(done) else [f"{len(said)} rounds were to be run again, {len(done)} were"]
    for one, two in zip(said, done, strict=False):
        pairs = [(key, one[key], two[key]) for key in ("cohort", "status", "bytes_up", "bytes_down")]
        pairs.append(("clients used", [c["client"] for c in one["clients"]], [c["client"] for c in two["clients"]]))
        found += [f"round {one['round']}: {key} was {a}, is {b}" for key, a, b in pairs if a != b]
        for a, b in zip(one["clients"], two["clients"], strict=False):
            if (a["client"], a["examples"], a["steps"]) != (b["client"], b["examples"], b["steps"]):
                found.append(
                    f"round {one['round']}: client {a['client']} had {a['examples']} examples, has {b['examples']}"
                )
            elif not math.isclose(a["loss"] or 0, b["loss"] or 0, rel_tol=TOLERANCE):
                found.append(
                    f"round {one['round']}: client {a['client']} had loss {a['loss']:.4f}, has {b['loss']:.4f}"
                )
    return found


def verify(packed: Path, rounds: int, data: str = "", watch: Reporter | None = None) -> list[str]:
    """Replay the first rounds of a packed run.

    Args:
        packed: a folder with `config.toml` and `rounds.jsonl`.
        rounds: how many.
        data: the folder of training files, where the run read one; a submission does not say where that was.
        watch: progress.

    Returns:
        What differs; nothing where the rounds are those of the submission.

    Raises:
        FedtuneError: the run cannot be made here.
    """
    tree = read_toml(packed / "config.toml")
    if data:
        tree["data"] = {**tree.get("data", {}), "path": data}
    tree["eval"] = {**tree.get("eval", {}), "base": False}
    said = read_lines(packed / "rounds.jsonl")[:rounds]
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        try:
            run(load([tree]), out, reporter=_Enough(len(said), watch or Reporter()))
        except CancelledError as err:
            if err.exit_code != _Enough.CODE:  # somebody's own Ctrl-C
                raise
        return differences(said, read_lines(out / "rounds.jsonl")[: len(said)])
