"""Bytes made again from shapes: what the rounds say they exchanged against what the adapter must have cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.io import read_lines
from fedtune.methods import METHODS
from fedtune.methods.base import Sizes
from fedtune.models.zoo import zoo
from fedtune.results.entry import Entry
from fedtune.tensors import tensor_header
from fedtune.types import Problem

# what a method may save below its own reckoning: ranks a client pruned, a first round that only sketches
LEEWAY = 0.25
ADAPTER = "adapter/adapter_model.safetensors"


Shapes = list[tuple[int, int]]


def _saved(folder: Path) -> tuple[Shapes, int]:
    """Return (in, out) of each adapted layer and the smallest rank, from the saved adapter's header."""
    header = tensor_header(folder / ADAPTER)
    shapes = {name: entry["shape"] for name, entry in header.items()}
    factors = [n for n in shapes if n.endswith(".lora_A.weight")]
    pairs = [(shapes[n], shapes[n.replace(".lora_A.", ".lora_B.")]) for n in factors]
    return sorted((a[1], b[0]) for a, b in pairs), min((min(a[0], b[1]) for a, b in pairs), default=0)


def _of_base(entry: Entry) -> Shapes | None:
    """Return (in, out) of each layer of the base model that the settings adapt; None where they are not known here."""
    base = zoo().get(entry.base)
    targets = entry.config["lora"]["target_modules"] or (base.targets if base else ())
    try:
        each = [base.linear(name) for name in targets] if base else []
    except KeyError:
        return None
    return sorted((i, o) for o, i in each) * base.layers if base and each else None


def _kept(entry: Entry) -> bool:
    """Tell whether a run of these settings leaves one adapter for all."""
    return entry.config["arm"] != "federated" or METHODS[entry.method].global_adapter


def adapter_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield an adapter that lacks, or that the settings do not make of the base model: its layers and ranks."""
    if not (folder / ADAPTER).is_file():
        if _kept(entry):
            yield Problem(ADAPTER, f"is missing; {entry.method} leaves an adapter")
        return
    if not _kept(entry):
        yield Problem(ADAPTER, f"is of no model that was evaluated; {entry.method} leaves none")
        return
    (layers, rank), wanted, lora = _saved(folder), _of_base(entry), entry.config["lora"]
    if wanted is not None and layers != sorted(wanted):
        yield Problem(ADAPTER, f"its {len(layers)} layers are not the {len(wanted)} that the settings adapt")
    if rank < min(lora["ranks"] or [lora["r"]]) and not METHODS[entry.method].ragged:
        yield Problem(ADAPTER, f"has a layer of rank {rank}, the settings say {lora['r']}")
    trained = sum(lora["r"] * (i + o) + (o if lora["dora"] else 0) for i, o in layers)
    if entry.costs.trainable_parameters != trained:
        said = entry.costs.trainable_parameters
        yield Problem("entry.costs.trainable_parameters", f"is {said}, its layers have {trained}")


def _least(layers: Shapes, entry: Entry, clients: int) -> tuple[float, float]:
    """Return the bytes (up, down) a client exchanges in a round by the method's own reckoning, headers left out."""
    rank, kind = int(entry.config["lora"]["r"]), METHODS[entry.method]
    each = [kind.traffic(Sizes(i * rank, o * rank, rank, clients)) for i, o in layers]
    return 4 * sum(up for up, _ in each), 4 * sum(down for _, down in each)


def byte_problems(folder: Path, entry: Entry) -> Iterator[Problem]:
    """Yield rounds that do not add up to the entry, lost uplinks it does not own to, and bytes that are too few."""
    rounds: list[dict[str, Any]] = read_lines(folder / "rounds.jsonl")
    if len(rounds) != entry.rounds or [r["round"] for r in rounds] != list(range(1, len(rounds) + 1)):
        yield Problem("rounds.jsonl", f"has {len(rounds)} rounds, the entry says {entry.rounds}")
    if entry.config["federation"]["rounds"] != entry.rounds:
        wanted = entry.config["federation"]["rounds"]
        yield Problem("entry.rounds", f"{entry.rounds} rounds were run, the settings ask for {wanted}")
    lost = sum(len(r["cohort"]) - len(r["clients"]) for r in rounds)
    if lost != entry.lost_clients:
        yield Problem("entry.lost_clients", f"says {entry.lost_clients}, the rounds have {lost} uplinks lost")
    for name, said in (("bytes_up", entry.costs.bytes_up), ("bytes_down", entry.costs.bytes_down)):
        counted = sum(r[name] for r in rounds)
        if counted != said:
            yield Problem(f"entry.costs.{name}", f"says {said:,}, the rounds add up to {counted:,}")
    skipped = sum(r["status"] == "skipped" for r in rounds)
    if skipped != entry.skipped_rounds:
        yield Problem("entry.skipped_rounds", f"says {entry.skipped_rounds}, {skipped} rounds were skipped")
    layers = _of_base(entry) or (_saved(folder)[0] if (folder / ADAPTER).is_file() else [])
    if layers and entry.config["arm"] == "federated" and not entry.config["lora"].get("ranks"):
        yield from _too_few(layers, entry, rounds)


def _too_few(layers: Shapes, entry: Entry, rounds: list[dict[str, Any]]) -> Iterator[Problem]:
    asked, answered = sum(len(r["cohort"]) for r in rounds), sum(len(r["clients"]) for r in rounds)
    most = max((len(r["cohort"]) for r in rounds), default=1)
    up, down = _least(layers, entry, most)
    stateful = METHODS[entry.method].private or METHODS[entry.method].keeps_base
    share = LEEWAY if stateful or METHODS[entry.method].ragged else 1.0
    for name, said, least in (
        ("bytes_up", entry.costs.bytes_up, up * answered * share),
        ("bytes_down", entry.costs.bytes_down, down * asked * share),
    ):
        if said < int(least * 0.999):
            yield Problem(
                f"entry.costs.{name}",
                f"says {said:,}; {entry.method} on these layers takes at least {int(least):,}",
            )
