"""The round loop, once, over Flower's Grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedtune.config import Config
from fedtune.federation import checkpoint, messages
from fedtune.federation.checkpoint import Progress
from fedtune.federation.faults import kill_point
from fedtune.io import append_lines
from fedtune.methods.base import Method, ServerState
from fedtune.models.budget import message_bytes
from fedtune.privacy.screen import Expected, Screened, screen
from fedtune.training.schedule import learning_rate
from fedtune.types import RoundRecord, RunFailedError, derive_seed

POLL = 0.2


@dataclass(frozen=True)
class Federation:
    """Everything the loop needs.

    Attributes:
        config: the run's settings.
        method: its server half is used.
        grid: in-process, simulation or deployment.
        registered: examples of each client; those with none are never asked.
        run_id: ties messages and checkpoints to this run.
        folder: where checkpoints, `rounds.jsonl` and `timings.jsonl` go.
        only: ask just these clients (for the local-only arm); None asks all.
        on_round: called after each round.
    """

    config: Config
    method: Method
    grid: Grid
    registered: Mapping[int, int]
    run_id: str
    folder: Path
    only: frozenset[int] | None = None
    on_round: Callable[[RoundRecord, ServerState], None] | None = None
    nodes: dict[int, int] = field(default_factory=dict)


def sample(config: Config, registered: Mapping[int, int], round_: int) -> list[int]:
    """Choose a round's cohort by partition id with a generator of its own; clients without examples never."""
    able = [c for c in sorted(registered) if registered[c] > 0]
    size = min(config.federation.cohort_size, len(able))
    generator = np.random.default_rng(derive_seed(config.seed, "sample", round_))
    return sorted(int(c) for c in generator.choice(able, size=size, replace=False))


def _cohort(fed: Federation, round_: int) -> list[int]:
    chosen = sample(fed.config, fed.registered, round_)
    return chosen if fed.only is None else [c for c in chosen if c in fed.only]


def connect(grid: Grid, clients: int, timeout: float, address: str = "this grid") -> dict[int, int]:
    """Wait until all clients are there and learn which node has which partition.

    Returns:
        node id -> client.

    Raises:
        RunFailedError: after `timeout` seconds, with how many came of how many, and where they were awaited.
    """
    known = getattr(grid, "partition_ids", None)
    if known is not None:
        return dict(known())
    deadline = time.monotonic() + timeout
    nodes: dict[int, int] = {}
    while len(nodes) < clients:
        new = [n for n in grid.get_node_ids() if n not in nodes]
        asked = [grid.create_message(RecordDict(), "query", n, "connect") for n in new]
        for reply in grid.send_and_receive(asked, timeout=max(0.1, deadline - time.monotonic())) if asked else ():
            if not reply.has_error():
                identity: Any = reply.content[messages.IDENTITY]
                nodes[reply.metadata.src_node_id] = int(identity["client"])
        if len(nodes) < clients and time.monotonic() > deadline:
            raise RunFailedError(f"{len(nodes)} of {clients} clients connected to {address} within {timeout:g} s")
        if len(nodes) < clients:
            time.sleep(POLL)
    return nodes


def _orders(fed: Federation, cohort: Sequence[int], round_: int, state: ServerState) -> list[Message]:
    near = bool(getattr(fed.grid, "in_process", False))
    by_client = {client: node for node, client in fed.nodes.items()}
    return [
        fed.grid.create_message(
            messages.train_order(fed.run_id, round_, c, fed.method.view(state, c), in_process=near),
            "train",
            by_client[c],
            str(round_),
            fed.config.federation.deadline,
        )
        for c in cohort
    ]


def _expected(fed: Federation, cohort: Sequence[int], round_: int, state: ServerState) -> Expected:
    signature = {c: fed.method.expected(state, c, round_) for c in cohort}
    return Expected(fed.run_id, round_, signature, fed.registered, fed.config.federation.weights)


def _received(replies: Iterable[Mapping[str, Tensor] | None]) -> int:
    return sum(message_bytes(t) for t in replies if t is not None)


def _one_round(fed: Federation, round_: int, progress: Progress) -> Progress:
    """Ask, screen, aggregate, record. Too few good updates leave the state untouched."""
    settings = fed.config.federation
    state = progress.state
    cohort = _cohort(fed, round_)
    started = time.monotonic()
    kill_point(round_, "send")
    answered = fed.grid.send_and_receive(_orders(fed, cohort, round_, state), timeout=settings.deadline)
    replies = [messages.read_reply(m, fed.nodes) for m in answered]
    trained = time.monotonic()
    kill_point(round_, "screen")
    screened = screen(replies, _expected(fed, cohort, round_, state))
    enough = len(screened.updates) >= min(settings.min_clients, max(1, len(cohort))) and bool(screened.updates)
    kill_point(round_, "aggregate")
    new_state = fed.method.server_step(screened.updates, state, round_) if enough else state
    down = sum(message_bytes(fed.method.view(state, c)) for c in cohort)
    up = _received(r.tensors for r in replies)
    record = _record(fed, round_, cohort, screened, enough, (down, up))
    finished = time.monotonic()
    timing = {"round": round_, "train_seconds": trained - started, "server_seconds": finished - trained}
    append_lines(fed.folder / "timings.jsonl", [timing])
    skipped = 0 if enough or not cohort else progress.skipped + 1
    return Progress(new_state, (*progress.records, record), skipped)


def _record(
    fed: Federation,
    round_: int,
    cohort: Sequence[int],
    screened: Screened,
    enough: bool,
    sizes: tuple[int, int],
) -> RoundRecord:
    status = "ok" if enough else "skipped" if cohort else "idle"
    return RoundRecord(
        round=round_,
        status=status,
        learning_rate=learning_rate(fed.config.train, round_, fed.config.federation.rounds),
        cohort=tuple(cohort),
        clients=screened.stats,
        rejected=screened.rejected,
        bytes_down=sizes[0],
        bytes_up=sizes[1],
        notes=screened.notes,
    )


def run_rounds(fed: Federation, start: ServerState) -> Progress:
    """Run all rounds that are not over yet, continuing from the newest whole checkpoint.

    Raises:
        RunFailedError: nobody has data, nobody connects, or too few good updates too often in a row.
        CancelledError: Ctrl-C or SIGTERM; the last finished round is on disk.
    """
    config = fed.config
    if not any(fed.registered.values()):
        raise RunFailedError("no client has an example to train on")
    fed.nodes.update(connect(fed.grid, config.federation.clients, config.federation.connect_timeout))
    progress, _ = checkpoint.newest(fed.folder, start, fed.run_id)
    for round_ in range(progress.round + 1, config.federation.rounds + 1):
        progress = _one_round(fed, round_, progress)
        kill_point(round_, "checkpoint")
        checkpoint.save(fed.folder, progress, fed.run_id, config.federation.keep_checkpoints)
        kill_point(round_, "recorded")
        if fed.on_round:
            fed.on_round(progress.records[-1], progress.state)
        if progress.skipped >= config.federation.max_skipped_rounds:
            raise RunFailedError(_why_failed(progress, config.federation.max_skipped_rounds))
    if progress.state.round == 0 and fed.only is None:
        raise RunFailedError("no round had enough good updates; the adapter is untouched")
    return progress


def _why_failed(progress: Progress, limit: int) -> str:
    last = progress.records[-1]
    reasons = "; ".join(f"client {r.client}: {r.reason} ({r.detail.strip().splitlines()[-1]})" for r in last.rejected)
    return f"{limit} rounds in a row had too few good updates; the last: {reasons}"
