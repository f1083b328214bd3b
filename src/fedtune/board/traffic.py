"""Bytes made again from shapes: what the rounds say they exchanged against what the adapter must have cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune import spaces
from fedtune.board.adapter import ADAPTER, saved
from fedtune.io import read_lines
from fedtune.methods import METHODS
from fedtune.methods.state import Sizes
from fedtune.methods.traits import moves_base, same_every_round
from fedtune.results.entry import Entry
from fedtune.types import Problem

# what a method may save below its own reckoning: ranks a client pruned, a first round that only sketches
LEEWAY = 0.25
Shapes = list[tuple[int, ...]]


def _least(layers: Shapes, entry: Entry, clients: int) -> tuple[float, float]:
    """Return the bytes (up, down) a client exchanges in a round by the method's own reckoning, headers left out."""
    config, kind = entry.settings, METHODS[entry.method]
    space, rank, up, down = spaces.of(config), config.lora.r, 0.0, 0.0
    for shape in layers:
        a, b, _ = space.numbers(shape, config)
        sent, got = kind.traffic(Sizes(a, b, rank, clients))
        # a change of the base model has at most a layer's full rank
        up, down = up + sent, down + (min(got, min(shape[:2]) * sum(shape[:2])) if moves_base(kind) else got)
    return 4 * up, 4 * down


def byte_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield rounds that do not add up to the entry, undisclosed lost replies, and bytes that are too few."""
    rounds: list[dict[str, Any]] = read_lines(folder / "rounds.jsonl")
    if len(rounds) != entry.rounds or [r["round"] for r in rounds] != list(range(1, len(rounds) + 1)):
        yield Problem("rounds.jsonl", f"has {len(rounds)} rounds, the entry says {entry.rounds}")
    settings = entry.settings
    if (wanted := settings.federation.rounds) != entry.rounds:
        yield Problem("entry.rounds", f"{entry.rounds} rounds were run, the settings ask for {wanted}")
    lost = sum(len(r["cohort"]) - len(r["clients"]) for r in rounds)
    if lost != entry.lost_clients:
        yield Problem("entry.lost_clients", f"says {entry.lost_clients}, lost replies in the rounds: {lost}")
    for name, said in (("bytes_up", entry.costs.bytes_up), ("bytes_down", entry.costs.bytes_down)):
        counted = sum(r[name] for r in rounds)
        if counted != said:
            yield Problem(f"entry.costs.{name}", f"says {said:,}, the rounds add up to {counted:,}")
    skipped = sum(r["status"] == "skipped" for r in rounds)
    if skipped != entry.skipped_rounds:
        yield Problem("entry.skipped_rounds", f"says {entry.skipped_rounds}, {skipped} rounds were skipped")
    space = spaces.of(settings)
    if space.unsubmitted or settings.arm != "federated" or settings.lora.ranks:
        return
    layers = space.on_base(entry) or (saved(folder, entry) if (folder / ADAPTER).is_file() else {})
    if layers:
        yield from _too_few(sorted(layers.values()), entry, rounds)


def _too_few(layers: Shapes, entry: Entry, rounds: list[dict[str, Any]]) -> Iterator[Problem]:
    asked, answered = sum(len(r["cohort"]) for r in rounds), sum(len(r["clients"]) for r in rounds)
    most = max((len(r["cohort"]) for r in rounds), default=1)
    up, down = _least(layers, entry, most)
    share = 1.0 if same_every_round(METHODS[entry.method]) else LEEWAY
    for name, said, least in (
        ("bytes_up", entry.costs.bytes_up, up * answered * share),
        ("bytes_down", entry.costs.bytes_down, down * asked * share),
    ):
        if said < int(least * 0.999):
            yield Problem(
                f"entry.costs.{name}",
                f"says {said:,}; {entry.method} on these layers takes at least {int(least):,}",
            )
