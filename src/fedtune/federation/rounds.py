"""The round loop, once, over Flower's Grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedtune.config import Config
from fedtune.federation import checkpoint
from fedtune.federation.checkpoint import Progress
from fedtune.federation.exchange import Exchange, exchange, joined
from fedtune.federation.faults import kill_point
from fedtune.federation.guard import aggregated, state_problem
from fedtune.federation.nodes import connect
from fedtune.federation.pool import Steps, complete
from fedtune.methods import Algorithm, ClientUpdate, RoundContext, ServerState
from fedtune.methods.sound import LARGEST
from fedtune.training.schedule import learning_rate
from fedtune.types import RoundRecord, RunFailedError, derive_seed, last_line


@dataclass(frozen=True)
class Federation:
    """Everything the loop needs.

    Attributes:
        config: the run's settings.
        algorithm: its server half is used.
        grid: where the clients are: in this process, or in a worker pool.
        registered: examples of each client; those with none are never asked.
        run_id: ties messages and checkpoints to this run.
        folder: where checkpoints, `rounds.jsonl` and `timings.jsonl` go.
        only: ask just these clients (for the local-only arm); None asks all.
        on_round: called after each round. When a run is continued, once more for the round it continues from: it may
            have died between that round's checkpoint and this call.
        on_note: told what a person should know, such as checkpoints that were passed over.
        nodes: node id -> client, once they are connected; `places` is the other way round.
    """

    config: Config
    algorithm: Algorithm
    grid: Grid
    registered: Mapping[int, int]
    run_id: str
    folder: Path
    only: frozenset[int] | None = None
    on_round: Callable[[RoundRecord, ServerState], None] | None = None
    on_note: Callable[[str], None] | None = None
    nodes: dict[int, int] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)

    @cached_property
    def able(self) -> NDArray[np.int64]:
        """The clients that can be asked."""
        return able(self.registered)

    @property
    def needed(self) -> int:
        """How many good updates a round needs, whatever the method; a client on its own is enough for itself."""
        return self.config.federation.min_clients if self.only is None else 1


def able(registered: Mapping[int, int]) -> NDArray[np.int64]:
    """Return the clients that have examples, in order."""
    return np.array([c for c in sorted(registered) if registered[c] > 0], dtype=np.int64)


def draw(config: Config, clients: NDArray[np.int64], round_: int) -> list[int]:
    """Choose a round's cohort of some clients with a generator of its own; what it costs depends on the cohort only."""
    size = min(config.federation.cohort_size, len(clients))
    generator = np.random.default_rng(derive_seed(config.seed, "sample", round_))
    places = generator.choice(len(clients), size=size, replace=False)
    return sorted(int(c) for c in clients[places])


def _cohort(fed: Federation, round_: int) -> list[int]:
    chosen = draw(fed.config, fed.able, round_)
    return chosen if fed.only is None else [c for c in chosen if c in fed.only]


def _stepped(
    fed: Federation, done: Exchange, asked: ServerState, before: ServerState, round_: int
) -> tuple[Exchange, ServerState]:
    """Return an exchange's outcome and the state after it: that before the round, where good updates are too few."""
    if not done.enough:
        return done.without((), done.shortage if done.screened.rejected else ""), before
    good, notes = done.screened.updates, list[str]()

    def step(updates: Sequence[ClientUpdate]) -> ServerState:
        notes.clear()
        refused = done.refused + len(good) - len(updates)
        return fed.algorithm.server_step(updates, asked, RoundContext(round_, refused, notes.append))

    found = aggregated(step, good)
    if found.state is None:
        return done.without(found.rejected, found.note).failed(), before
    done = done.without(found.rejected, found.note, *notes)
    return done, found.state if done.enough else before


def _exchanges(
    fed: Federation, cohort: Sequence[int], round_: int, state: ServerState
) -> Steps[tuple[Exchange, ServerState, float]]:
    """Make exchanges until the state is of this round, with those who are still in it; also return the server's time.

    A client that is lost on the way is not asked again in the round.
    """
    done, phase, server = (yield from exchange(fed, cohort, (round_, 1), state)), 1, 0.0
    asked = state
    while True:
        kill_point(round_, "aggregate")
        started = time.monotonic()
        done, asked = _stepped(fed, done, asked, state, round_)
        server += time.monotonic() - started
        if asked.round == round_ or not done.enough:
            return done, asked, server
        phase += 1
        done = joined(done, (yield from exchange(fed, done.good, (round_, phase), asked)))


def one_round(fed: Federation, round_: int, progress: Progress) -> Steps[Progress]:
    """Ask, screen, aggregate, record. Too few good updates leave the state untouched.

    Raises:
        RunFailedError: the state that a skipped round leaves is not sound; the last checkpoint is.
    """
    state, cohort = progress.state, _cohort(fed, round_)
    started = time.monotonic()
    kill_point(round_, "send")
    done, new_state, server = yield from _exchanges(fed, cohort, round_, state)
    # nothing was aggregated, and the model is another: somebody wrote into it
    if new_state is state and (problem := state_problem(state, LARGEST)):
        what = f"round {round_} was skipped and changed the model all the same: {problem}"
        raise RunFailedError(f"{what}; the last checkpoint is sound, and --resume continues from it")
    train = time.monotonic() - started - server
    timing = {"round": round_, "train_seconds": train, "server_seconds": server}
    # a round in which nobody was to be asked says nothing about those who are
    skipped = 0 if done.enough else progress.skipped + (1 if cohort else 0)
    return progress.after(new_state, _record(fed, round_, cohort, done), skipped, timing)


def _record(fed: Federation, round_: int, cohort: Sequence[int], done: Exchange) -> RoundRecord:
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


def _check_clients(fed: Federation) -> None:
    """Refuse a federation in which no round could ever have enough clients."""
    if not len(fed.able):
        raise RunFailedError("no client has an example to train on")
    least = fed.config.federation.min_clients
    if fed.only is None and len(fed.able) < least:
        raise RunFailedError(
            f"federation.min_clients is {least}, but only {len(fed.able)} of {len(fed.registered)} clients have "
            "examples; lower it, or choose another data.partition"
        )
    if fed.only is None and (short := fed.algorithm.shortage(len(fed.able))):
        raise RunFailedError(f"{short}: the others have no examples; choose another data.partition")


def _continued(fed: Federation, start: ServerState) -> Progress:
    """Return where the run stands on disk; the last round is announced again, and what was found damaged is told."""
    progress, notes = checkpoint.newest(fed.folder, start, fed.run_id)
    for note in notes:
        if fed.on_note:
            fed.on_note(note)
    if progress.records and fed.on_round:
        fed.on_round(progress.records[-1], progress.state)
    return progress


def rounds(fed: Federation, start: ServerState) -> Steps[Progress]:
    """Run all rounds that are not over yet, continuing from the newest whole checkpoint.

    Raises:
        RunFailedError: too few clients have data, nobody connects, or too few good updates too often in a row.
        ResumeError: there are rounds on disk, and no checkpoint of them that can be read.
        CancelledError: Ctrl-C or SIGTERM; the last finished round is on disk.
    """
    config = fed.config
    _check_clients(fed)
    fed.nodes.update(connect(fed.grid, config.federation.clients, config.federation.connect_timeout))
    fed.places.update({client: node for node, client in fed.nodes.items()})
    progress = _continued(fed, start)
    for round_ in range(progress.round + 1, config.federation.rounds + 1):
        progress = yield from one_round(fed, round_, progress)
        kill_point(round_, "checkpoint")
        checkpoint.save(fed.folder, progress, fed.run_id, config.federation.keep_checkpoints)
        kill_point(round_, "recorded")
        if fed.on_round:
            fed.on_round(progress.records[-1], progress.state)
        _check_skipped(fed, progress)
    if progress.state.round == 0:
        raise RunFailedError(_why_untouched(fed, progress))
    return progress


def run_rounds(fed: Federation, start: ServerState) -> Progress:
    """Run all rounds beside no other run; see `rounds`."""
    return complete(rounds(fed, start))


def _check_skipped(fed: Federation, progress: Progress) -> None:
    """End a run in which too many rounds in a row had too few good updates."""
    limit = fed.config.federation.max_skipped_rounds
    if progress.skipped >= limit:
        raise RunFailedError(f"{limit} rounds in a row had too few good updates; the last: {_why(progress)}")


def _why_untouched(fed: Federation, progress: Progress) -> str:
    if fed.only is not None and not any(r.cohort for r in progress.records):
        return f"not asked in any of {progress.round} rounds; the adapter is untouched"
    return f"no round had enough good updates; the adapter is untouched; the last: {_why(progress)}"


def _why(progress: Progress) -> str:
    """Return what went wrong in the last round in which somebody was asked."""
    last = next(r for r in reversed(progress.records) if r.cohort)
    reasons = [f"client {r.client}: {r.reason} ({last_line(r.detail)})" for r in last.rejected]
    return "; ".join([*reasons[:5], *([f"{len(reasons) - 5} more"] if len(reasons) > 5 else []), *last.notes[-1:]])
