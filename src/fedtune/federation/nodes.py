"""Which node has which partition: told by a grid in this process, asked of any other."""

from __future__ import annotations

import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.federation import messages
from fedtune.types import RunFailedError

POLL = 0.2


def _partition(reply: Message, clients: int) -> int | None:
    """Return which partition a node says it has; None if it says nothing that can be."""
    try:
        identity = None if reply.has_error() else reply.content.get(messages.IDENTITY)
    except Exception:  # whatever a node sends instead of an answer
        return None
    said = identity.get("client") if isinstance(identity, ConfigRecord) else None
    return said if type(said) is int and 0 <= said < clients else None


def _ask(grid: Grid, nodes: list[int], clients: int, timeout: float) -> dict[int, int]:
    """Ask nodes for their partitions; return node id -> partition of those that gave a possible answer."""
    asked = [grid.create_message(RecordDict(), "query", node, "connect") for node in nodes]
    replies = grid.send_and_receive(asked, timeout=timeout) if asked else ()
    said = ((reply.metadata.src_node_id, _partition(reply, clients)) for reply in replies)
    return {node: partition for node, partition in said if partition is not None and node in nodes}


def connect(grid: Grid, clients: int, timeout: float, address: str = "this grid") -> dict[int, int]:
    """Wait until every partition has a node, and learn which.

    Of several nodes with one partition the first counts, as long as it is there; one that comes back under another
    id takes its own place again.

    Returns:
        node id -> client, one node for each client.

    Raises:
        RunFailedError: after `timeout` seconds, with how many came of how many, and where they were awaited.
    """
    known = getattr(grid, "partition_ids", None)
    if known is not None:
        return dict(known())
    deadline = time.monotonic() + timeout
    nodes: dict[int, int] = {}
    spare: dict[int, int] = {}
    while True:
        there = list(grid.get_node_ids())
        new = [n for n in there if n not in nodes and n not in spare]
        answered = _ask(grid, new, clients, max(0.1, deadline - time.monotonic()))
        nodes, spare = _settled({n: p for n, p in {**nodes, **spare, **answered}.items() if n in there})
        if len(nodes) == clients:
            return nodes
        if time.monotonic() > deadline:
            raise RunFailedError(_missing(nodes, spare, clients, f"{address} within {timeout:g} s"))
        time.sleep(POLL)


def _settled(said: dict[int, int]) -> tuple[dict[int, int], dict[int, int]]:
    """Return the first node of each partition, and all others."""
    first = {partition: node for node, partition in reversed(said.items())}
    nodes = {node: partition for node, partition in said.items() if first[partition] == node}
    return nodes, {node: partition for node, partition in said.items() if node not in nodes}


def _missing(nodes: dict[int, int], spare: dict[int, int], clients: int, where: str) -> str:
    text = f"{len(nodes)} of {clients} clients connected to {where}"
    taken = sorted(set(spare.values()))
    return text + (f"; more than one node says that it has partition {taken[0]}" if taken else "")
