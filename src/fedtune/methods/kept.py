"""What a client keeps between its rounds, with a step back for a round that did not count.

An answer that never arrived, was rejected or was of a skipped round has moved what the client has, and not what the
server's sum has of it; from then on both would be apart. So the client keeps what it had before as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.methods.requests import Tensors

if TYPE_CHECKING:
    from torch import Tensor

AT, WAS = "at", "was/"


def with_previous(new: Tensors, old: Tensors, round_: int, prefix: str = "") -> dict[str, Tensor]:
    """Return what a client keeps after a round, beside what it had before; `prefix` is of the names added."""
    return {**new, **{prefix + WAS + n: t for n, t in old.items()}, prefix + AT: torch.tensor(round_)}


def as_of(kept: Tensors, round_: int, prefix: str = "") -> dict[str, Tensor]:
    """Return what a client kept, as the server has it: of the round before where its last one is later than a round."""
    at, was = prefix + AT, prefix + WAS
    if at in kept and int(kept[at]) > round_:
        return {n.removeprefix(was): t for n, t in kept.items() if n.startswith(was)}
    return {n: t for n, t in kept.items() if n != at and not n.startswith(was)}
