"""A client's reply as it was read from a message: nothing in it is trusted yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reply:
    """What came back for one message, decoded but not yet trusted.

    Attributes:
        client: the client it was sent to, as the transport knows; None for a node never asked.
        claims: (run, round, client, exchange of the round) as the reply says.
        tensors: the update; None for an error reply.
        metrics: numbers by name.
        error: the client's traceback, if it failed.
        problem: what of the reply could not be read.
        bytes: of the update on the wire; of tensors that announce more than they hold, what they hold.
        asked: it answers this exchange's own order, as the transport knows: other claims than that order's are false.
    """

    client: int | None
    claims: tuple[str, int, int, int] | None
    tensors: Mapping[str, Tensor] | None
    metrics: Mapping[str, float]
    error: str = ""
    problem: str = ""
    bytes: int = 0
    asked: bool = False
