"""One exchange of a round: orders go out, replies are screened as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flwr.app import Message
from flwr.app.metadata import Metadata
from torch import Tensor

from fedtune import objectives
from fedtune.federation import messages, pool
from fedtune.federation.faults import kill_point
from fedtune.federation.pool import Steps
from fedtune.federation.screening import CONTENT, Expected, Most, Screened, Screening
from fedtune.lora.algebra import RunningMean, wide
from fedtune.lora.state import copied
from fedtune.methods import ClientUpdate, ServerState, Upload
from fedtune.models.budget import message_bytes
from fedtune.training import schedule
from fedtune.types import Rejection

if TYPE_CHECKING:
    from fedtune.federation.rounds import Federation

When = tuple[int, int]


class _Orders:
    """The messages of one exchange, made one by one as they are sent, and the bytes sent so far."""

    def __init__(self, fed: Federation, cohort: Sequence[int], when: When, state: ServerState) -> None:
        self._fed, self._cohort, self._when, self._state = fed, cohort, when, state
        self.bytes = 0
        self._sent: dict[int, Metadata] = {}

    def answered(self, client: int | None, message: Message) -> bool:
        """Tell whether a client's message answers what it was sent in this exchange, as the transport knows."""
        try:
            sent = self._sent.get(-1 if client is None else client)
            return sent is not None and message.metadata.reply_to_message_id == sent.message_id != ""
        except Exception:  # whatever came instead of a message
            return False

    def __iter__(self) -> Iterator[Message]:
        grid, settings = self._fed.grid, self._fed.config.federation
        near = bool(getattr(grid, "in_process", False))
        last: dict[str, Tensor] = {}
        for client in self._cohort:
            download = self._fed.algorithm.view(self._state, client)
            if not last or not _same(download, last):  # most often all clients get the very same
                last, each = download, message_bytes(download)
                record = None if near else messages.pack(download, in_process=False)
            self.bytes += each
            # in one process each client gets tensors of its own: what it writes into them is seen by nobody else
            sent = record or messages.pack(copied(download), in_process=True)
            order = messages.train_order(self._fed.run_id, self._when, client, sent)
            node = self._fed.places[client]
            message = grid.create_message(order, "train", node, str(self._when[0]), settings.deadline)
            self._sent[client] = message.metadata  # its id is given when it is sent
            yield message


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two mappings hold the very same tensors."""
    return one.keys() == other.keys() and all(t is other[n] for n, t in one.items())


class _Uploads(Mapping[int, Upload]):
    """What each client that was asked has to send, made when its reply is looked at."""

    def __init__(self, cohort: Sequence[int], make: Callable[[int], Upload]) -> None:
        self._cohort, self._make = dict.fromkeys(cohort), make

    def __getitem__(self, client: int) -> Upload:
        if client not in self._cohort:
            raise KeyError(client)
        return self._make(client)

    def __contains__(self, client: object) -> bool:
        return client in self._cohort

    def __iter__(self) -> Iterator[int]:
        return iter(self._cohort)

    def __len__(self) -> int:
        return len(self._cohort)


def _plan(fed: Federation, client: int, round_: int) -> list[list[int]]:
    """Return the rows of each of a client's steps: the server knows them as well as the client does."""
    return schedule.batches(fed.config.train, fed.registered[client], fed.config.seed, client, round_)


def _expected(fed: Federation, cohort: Sequence[int], when: When, state: ServerState) -> Expected:
    train, (round_, phase) = fed.config.train, when
    rate = schedule.learning_rate(train, round_, fed.config.federation.rounds)

    def upload(client: int) -> Upload:
        return fed.algorithm.upload(state, client, round_, len(_plan(fed, client, round_)), rate)

    def most(client: int) -> Most:
        steps, objective = upload(client).losses, objectives.kind(fed.config)
        tokens = steps * train.batch * objective.texts * train.max_length
        return Most(schedule.distinct(_plan(fed, client, round_)), steps, tokens, objective.least)

    weights = fed.config.federation.weights
    return Expected(fed.run_id, round_, _Uploads(cohort, upload), fed.registered, most, weights, phase)


@dataclass(frozen=True)
class Exchange:
    """One exchange's screened replies, whose were good, its bytes (down, up), and the federation that made it."""

    screened: Screened
    good: tuple[int, ...]
    bytes: tuple[int, int]
    fed: Federation

    @property
    def refused(self) -> int:
        """How many clients without a good reply had one refused for what it holds."""
        return len({r.client for r in self.screened.rejected if r.reason in CONTENT}.difference(self.good))

    @property
    def shortage(self) -> str:
        """Why the good updates are too few for a robust rule; empty if they are not."""
        return self.fed.algorithm.shortage(len(self.good), self.refused)

    @property
    def enough(self) -> bool:
        """Whether there are enough good updates to go on."""
        return len(self.good) >= self.fed.needed and not self.shortage

    def failed(self) -> Exchange:
        """Return the exchange with no update that could be used."""
        return replace(self, screened=replace(self.screened, stats=()), good=())

    def without(self, rejected: Sequence[Rejection], *notes: str) -> Exchange:
        """Return the exchange without clients that could not be aggregated, and with what went wrong."""
        lost = {r.client for r in rejected}
        screened = replace(
            self.screened,
            updates=tuple(u for u in self.screened.updates if u.client not in lost),
            stats=tuple(s for s in self.screened.stats if s.client not in lost),
            rejected=(*self.screened.rejected, *rejected),
            notes=(*self.screened.notes, *(note for note in notes if note)),
        )
        return replace(self, screened=screened, good=tuple(c for c in self.good if c not in lost))


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
            self._sum.add({name: wide(t) for name, t in update.tensors.items()}, update.examples)

    def close(self) -> list[ClientUpdate]:
        """Return the updates, or one that stands for all."""
        if self._sum is None or not self._sum.weight:
            return self._all
        return [ClientUpdate(0, self._sum.mean(), self._sum.weight)]


def exchange(fed: Federation, cohort: Sequence[int], when: When, state: ServerState) -> Steps[Exchange]:
    """Send a state to a cohort and take the replies; `when` is the round, and which exchange of it."""
    settings = fed.config.federation
    orders, screening = _Orders(fed, cohort, when, state), Screening(_expected(fed, cohort, when, state))
    updates, up = _Updates(summed=fed.algorithm.linear), 0

    def take(message: Message) -> None:
        nonlocal up
        reply = messages.read_reply(message, fed.nodes)
        update = screening.take(replace(reply, asked=orders.answered(reply.client, message)))
        up += message_bytes(update.tensors) if update else reply.bytes
        if update is not None:
            updates.add(update)

    yield from pool.exchange(fed.grid, orders, take, settings.deadline)
    kill_point(when[0], "screen")
    good, screened = tuple(screening.good), screening.close(updates.close())
    return Exchange(screened, good, (orders.bytes, up), fed)


def joined(first: Exchange, last: Exchange) -> Exchange:
    """Return a later exchange of a round with what was rejected before it; the statistics are those of the training."""
    screened = replace(
        last.screened,
        stats=tuple(s for s in first.screened.stats if s.client in last.good),
        rejected=(*first.screened.rejected, *last.screened.rejected),
        notes=(*first.screened.notes, *last.screened.notes),
    )
    sizes = first.bytes[0] + last.bytes[0], first.bytes[1] + last.bytes[1]
    return replace(last, screened=screened, bytes=sizes)
