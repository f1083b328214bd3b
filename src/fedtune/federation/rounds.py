"""The round loop, once, over Flower's Grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from fedtune.lora.algebra import RunningMean
from fedtune.methods import ClientUpdate, Recipe, ServerState
from fedtune.models.budget import message_bytes
from fedtune.privacy.screen import Expected, Screened, Screening
from fedtune.training.schedule import learning_rate
from fedtune.types import RoundRecord, RunFailedError, derive_seed, last_line

POLL = 0.2
When = tuple[int, int]


@dataclass(frozen=True)
class Federation:
    """Everything the loop needs.

    Attributes:
        config: the run's settings.
        recipe: its server half is used.
        grid: in-process, simulation or deployment.
        registered: examples of each client; those with none are never asked.
        run_id: ties messages and checkpoints to this run.
        folder: where checkpoints, `rounds.jsonl` and `timings.jsonl` go.
        only: ask just these clients (for the local-only arm); None asks all.
        on_round: called after each round.
        nodes: node id -> client, once they are connected; `places` is the other way round.
    """

    config: Config
    recipe: Recipe
    grid: Grid
    registered: Mapping[int, int]
    run_id: str
    folder: Path
    only: frozenset[int] | None = None
    on_round: Callable[[RoundRecord, ServerState], None] | None = None
    nodes: dict[int, int] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)


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


class _Orders:
    """The messages of one exchange, made one by one as they are sent, and the bytes sent so far."""

    def __init__(self, fed: Federation, cohort: Sequence[int], when: When, state: ServerState) -> None:
        self._fed, self._cohort, self._when, self._state = fed, cohort, when, state
        self.bytes = 0

    def __iter__(self) -> Iterator[Message]:
        grid, settings = self._fed.grid, self._fed.config.federation
        near = bool(getattr(grid, "in_process", False))
        last: dict[str, Tensor] = {}
        for client in self._cohort:
            download = self._fed.recipe.view(self._state, client)
            if not last or not _same(download, last):  # most often all clients get the very same
                last, record, each = download, messages.pack(download, in_process=near), message_bytes(download)
            self.bytes += each
            order = messages.train_order(self._fed.run_id, self._when, client, record)
            node = self._fed.places[client]
            yield grid.create_message(order, "train", node, str(self._when[0]), settings.deadline)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two mappings hold the very same tensors."""
    return one.keys() == other.keys() and all(t is other[n] for n, t in one.items())


class _Signatures(Mapping[int, Mapping[str, Tensor]]):
    """What each client that was asked has to send, made when its reply is looked at."""

    def __init__(self, cohort: Sequence[int], make: Callable[[int], Mapping[str, Tensor]]) -> None:
        self._cohort, self._make = dict.fromkeys(cohort), make

    def __getitem__(self, client: int) -> Mapping[str, Tensor]:
        if client not in self._cohort:
            raise KeyError(client)
        return self._make(client)

    def __contains__(self, client: object) -> bool:
        return client in self._cohort

    def __iter__(self) -> Iterator[int]:
        return iter(self._cohort)

    def __len__(self) -> int:
        return len(self._cohort)


def _expected(fed: Federation, cohort: Sequence[int], when: When, state: ServerState) -> Expected:
    round_, phase = when
    method = fed.recipe.method
    return Expected(
        fed.run_id,
        round_,
        _Signatures(cohort, lambda client: fed.recipe.expected(state, client, round_)),
        fed.registered,
        fed.config.federation.weights,
        (lambda tensors, client: method.flaw(tensors, state, client, round_)) if method.ragged else None,
        phase,
    )


@dataclass(frozen=True)
class _Exchange:
    """One exchange's screened replies, whose were good, its bytes (down, up), and whether they are enough."""

    screened: Screened
    good: tuple[int, ...]
    bytes: tuple[int, int]
    enough: bool


class _Updates:
    """The good updates of an exchange: all of them, or only their sum where the method sees no more."""

    def __init__(self, *, summed: bool) -> None:
        self._sum = RunningMean() if summed else None
        self._all: list[ClientUpdate] = []

    def add(self, update: ClientUpdate) -> None:
        """Take an update."""
        if self._sum is None:
            self._all.append(update)
        else:
            self._sum.add(update.tensors, update.examples)

    def close(self) -> list[ClientUpdate]:
        """Return the updates, or one that stands for all."""
        if self._sum is None or not self._sum.weight:
            return self._all
        return [ClientUpdate(0, self._sum.mean(), self._sum.weight)]


def _exchange(fed: Federation, cohort: Sequence[int], when: When, state: ServerState) -> _Exchange:
    settings = fed.config.federation
    orders, screening = _Orders(fed, cohort, when, state), Screening(_expected(fed, cohort, when, state))
    updates, up = _Updates(summed=fed.recipe.streams), 0
    for message in fed.grid.send_and_receive(orders, timeout=settings.deadline):
        reply = messages.read_reply(message, fed.nodes)
        up += message_bytes(reply.tensors) if reply.tensors is not None else 0
        update = screening.take(reply)
        if update is not None:
            updates.add(update)
    kill_point(when[0], "screen")
    good = tuple(screening.good)
    least = max(fed.recipe.fewest, min(settings.min_clients, max(1, len(cohort))))
    screened = screening.close(updates.close())
    if cohort and (short := fed.recipe.shortage(len(good))):
        screened = replace(screened, notes=(*screened.notes, short))
    return _Exchange(screened, good, (orders.bytes, up), bool(good) and len(good) >= least)


def _all_exchanges(
    fed: Federation, cohort: Sequence[int], round_: int, state: ServerState
) -> tuple[_Exchange, ServerState]:
    """Make a round's exchanges; return the last one, with everything rejected on the way, and the state it answers.

    A client that is lost on the way is not asked again in the round.
    """
    done = _exchange(fed, cohort, (round_, 1), state)
    for phase in range(2, fed.recipe.phases + 1):
        if not done.enough:
            break
        state = fed.recipe.middle(done.screened.updates, state, round_)
        last = _exchange(fed, done.good, (round_, phase), state)
        screened = replace(
            last.screened,
            stats=tuple(s for s in done.screened.stats if s.client in last.good),
            rejected=(*done.screened.rejected, *last.screened.rejected),
            notes=(*done.screened.notes, *last.screened.notes),
        )
        sizes = done.bytes[0] + last.bytes[0], done.bytes[1] + last.bytes[1]
        done = _Exchange(screened, last.good, sizes, last.enough)
    return done, state


def one_round(fed: Federation, round_: int, progress: Progress) -> Progress:
    """Ask, screen, aggregate, record. Too few good updates leave the state untouched."""
    state = progress.state
    cohort = _cohort(fed, round_)
    started = time.monotonic()
    kill_point(round_, "send")
    done, asked = _all_exchanges(fed, cohort, round_, state)
    trained = time.monotonic()
    kill_point(round_, "aggregate")
    new_state = fed.recipe.server_step(done.screened.updates, asked, round_) if done.enough else state
    record = _record(fed, round_, cohort, done)
    finished = time.monotonic()
    timing = {"round": round_, "train_seconds": trained - started, "server_seconds": finished - trained}
    append_lines(fed.folder / "timings.jsonl", [timing])
    skipped = 0 if done.enough or not cohort else progress.skipped + 1
    return Progress(new_state, (*progress.records, record), skipped)


def _record(fed: Federation, round_: int, cohort: Sequence[int], done: _Exchange) -> RoundRecord:
    return RoundRecord(
        round=round_,
        status="ok" if done.enough else "skipped" if cohort else "idle",
        learning_rate=learning_rate(fed.config.train, round_, fed.config.federation.rounds),
        cohort=tuple(cohort),
        clients=done.screened.stats,
        rejected=done.screened.rejected,
        bytes_down=done.bytes[0],
        bytes_up=done.bytes[1],
        notes=done.screened.notes,
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
    fed.places.update({client: node for node, client in fed.nodes.items()})
    progress, _ = checkpoint.newest(fed.folder, start, fed.run_id)
    for round_ in range(progress.round + 1, config.federation.rounds + 1):
        progress = one_round(fed, round_, progress)
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
    reasons = "; ".join(f"client {r.client}: {r.reason} ({last_line(r.detail)})" for r in last.rejected)
    return f"{limit} rounds in a row had too few good updates; the last: {reasons}"
