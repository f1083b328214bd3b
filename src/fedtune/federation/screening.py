"""Screen every reply before it can touch the global model.

Flower's own aggregation accepts NaN, broadcasts wrong shapes and dies of one strange reply; nothing reaches a
method here that has not passed this file. What has passed is well-formed, finite and of a bounded size: a reply that
is not changes nothing but the record. It says nothing about intent: an update inside the bound that pulls the model
astray is what robust rules are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedtune.federation.reply import Reply
from fedtune.lora.state import copied
from fedtune.methods.state import ClientUpdate, Upload
from fedtune.names import rank_axis
from fedtune.types import ClientStats, Rejection, last_line, plain

# a count above is no measurement; it stays whole as a float
LARGEST_COUNT = 1e15
# reasons that lie in what a reply holds: not in that it came late, twice, of nobody who was asked, or as an error
CONTENT = frozenset(
    ("malformed", "claims", "keys", "dtype", "rank", "shape", "values", "non_finite", "too_large", "examples")
) | {"aggregation"}
# no cross-entropy of a model is larger, in nats
LARGEST_LOSS = 1e4


@dataclass(frozen=True)
class Most:
    """What a client can have done in a round at most: different examples used, losses taken, tokens in them.

    `least` is the smallest loss that there can be.
    """

    examples: int
    steps: int
    tokens: int
    least: float = 0.0


@dataclass(frozen=True)
class Expected:
    """What a good reply of this round looks like.

    Attributes:
        run: the run's id.
        round: the round's number.
        uploads: for each client asked, what it has to send.
        registered: for each client, how many examples its shard has.
        most: what a client can have done, by the round's own plan of its steps.
        weights: whether examples used or the whole shard weigh.
        phase: which exchange of the round.
    """

    run: str
    round: int
    uploads: Mapping[int, Upload]
    registered: Mapping[int, int]
    most: Callable[[int], Most]
    weights: str = "examples-used"
    phase: int = 1


@dataclass(frozen=True)
class Screened:
    """The updates that may be aggregated (sorted by client), their statistics, all rejections, and remarks."""

    updates: tuple[ClientUpdate, ...]
    stats: tuple[ClientStats, ...]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]


def _identity(reply: Reply, expected: Expected, seen: set[int]) -> tuple[str, str] | None:
    """Reject replies of strangers, of other rounds or runs, second ones, and those that nothing can be read from."""
    if reply.client is None or reply.client not in expected.uploads:
        return "unknown_client", "the node was not asked this round"
    if reply.client in seen:  # whatever it holds: what counts of a client is its first reply
        return "duplicate", "a second reply of this client"
    if reply.error:
        return "error", reply.error
    run, round_, client, phase = reply.claims or (expected.run, expected.round, reply.client, expected.phase)
    if (run, round_, phase) != (expected.run, expected.round, expected.phase):
        now = f"run {expected.run} round {expected.round}.{expected.phase}"
        return "claims" if reply.asked else "stale", f"answers run {run} round {round_}.{phase}, now is {now}"
    if client != reply.client:
        return "claims", f"sent by client {reply.client}, claims to be {client}"
    if reply.problem or reply.claims is None or reply.tensors is None:
        return "malformed", reply.problem or "the reply lacks its identity or its update"
    return None


def _keys(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[str, str] | None:
    missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing or extra:
        return (
            "keys",
            f"missing {missing[:1] or 'none'}, unknown {extra[:1] or 'none'} ({len(missing)}/{len(extra)})",
        )
    return None


def _dtypes(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[str, str] | None:
    for name, tensor in want.items():
        if got[name].dtype != tensor.dtype:
            return "dtype", f"{name}: got {got[name].dtype}, expected {tensor.dtype}"
    return None


def _shapes(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Reject by exact signature: a shape that would broadcast is as wrong as any other."""
    for name, tensor in want.items():
        if got[name].shape != tensor.shape:
            axis = rank_axis(name)
            if axis is not None and got[name].dim() == 2 and got[name].shape[1 - axis] == tensor.shape[1 - axis]:
                return "rank", f"{name}: rank {got[name].shape[axis]}, this client's is {tensor.shape[axis]}"
            return "shape", f"{name}: got {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
    return None


def _own(got: Mapping[str, Tensor], upload: Upload) -> tuple[str, str] | None:
    """Reject what the method finds wrong."""
    problem = upload.problem(got)
    return ("shape" if upload.ragged else "values", problem) if problem else None


def _norm(tensor: Tensor) -> float:
    """Return the Frobenius norm; infinite where float32 cannot hold it."""
    numbers = tensor if tensor.is_floating_point() else tensor.float()
    return float(torch.linalg.vector_norm(numbers, dtype=torch.promote_types(numbers.dtype, torch.float32)))


def _size(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], growth: Callable[[str], float]
) -> tuple[str, str] | None:
    """Reject what is not finite, or too large to come of training from what was sent."""
    for name, tensor in got.items():
        norm = _norm(tensor)
        if norm <= growth(name):
            continue
        if not torch.isfinite(tensor).all():
            return "non_finite", f"{name} has NaN or infinity"
        limit = growth(name) + _norm(want[name])
        if not norm <= limit:
            return "too_large", f"{name} has norm {norm:.3g}, at most {limit:.3g} is accepted"
    return None


def _examples(reply: Reply) -> tuple[str, str] | None:
    examples = reply.metrics.get("examples", math.nan)
    if not 0 < examples <= LARGEST_COUNT or examples != int(examples):
        return "examples", f"examples = {examples}; must be a whole number above 0"
    return None


def _formed(got: Mapping[str, Tensor], upload: Upload) -> tuple[str, str] | None:
    """Reject an update of other names, types or shapes."""
    want = upload.tensors
    return _keys(got, want) or _dtypes(got, want) or (_own(got, upload) if upload.ragged else _shapes(got, want))


def _content(got: Mapping[str, Tensor], upload: Upload) -> tuple[str, str] | None:
    return _size(got, upload.tensors, upload.growth) or (None if upload.ragged else _own(got, upload))


def _judged(reply: Reply, expected: Expected, seen: set[int]) -> tuple[Reply, tuple[str, str] | None]:
    """Return a reply with tensors of its own, and why it is not used; what fails the examination is malformed.

    A client in this process can write into what it sent at any time, so all that counts is found of a copy; its form
    before as well, as it may be too large to copy.
    """
    client, sent = reply.client, reply.tensors
    try:
        wrong = _identity(reply, expected, seen)
        if client is not None and sent is not None and not wrong:
            upload = expected.uploads[client]
            if not (wrong := _formed(sent, upload)):
                reply = replace(reply, tensors=(own := copied(sent)))
                wrong = _formed(own, upload) or _content(own, upload) or _examples(reply)
    except Exception as err:
        wrong = "malformed", f"{type(err).__name__}: {last_line(str(err))}"
    return reply, ((wrong[0], plain(wrong[1])) if wrong else None)


def _within(metrics: Mapping[str, float], name: str, most: float, notes: list[str], least: float = 0.0) -> float | None:
    """Return a number that a client reports; None where it reports none, or, with a note, one that cannot be."""
    value = metrics.get(name, math.nan)
    if math.isnan(value) or least <= value <= most:
        return None if math.isnan(value) else value
    range_ = f"at least {least:g}" if value < least else f"at most {most:g}"
    notes.append(f"{name} = {value:g} cannot be ({range_}), left out")
    return None


def _accept(reply: Reply, expected: Expected) -> tuple[ClientUpdate, ClientStats, list[str]]:
    """Turn a reply that passed into an update; more examples than the round's steps have are capped."""
    client, tensors = reply.client, reply.tensors
    if client is None or tensors is None:
        raise ValueError("only screened replies are accepted")
    most, claimed = expected.most(client), int(reply.metrics["examples"])
    used = min(claimed, most.examples)
    notes = [f"{claimed} examples capped to the {used} of its steps"] if claimed > used else []
    stats = ClientStats(
        client=client,
        examples=used,
        tokens=int(_within(reply.metrics, "tokens", most.tokens, notes) or 0),
        steps=int(_within(reply.metrics, "steps", most.steps, notes) or 0),
        loss=_within(reply.metrics, "loss", LARGEST_LOSS, notes, most.least),
    )
    weight = expected.registered[client] if expected.weights == "shard-size" else used
    update = ClientUpdate(client, tensors, weight, stats.steps, stats.loss, expected.round - 1)
    return update, stats, [f"client {client}: {note}" for note in notes]


class Screening:
    """Sorts the replies of one exchange as they come.

    A client that was asked and has no reply at all is rejected as `no_reply`. Metrics nobody asked for are ignored; a
    loss that is missing or cannot be becomes None, such a count 0; what cannot be is noted.
    """

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._stats: dict[int, ClientStats] = {}
        self._rejected: list[Rejection] = []
        self._notes: list[str] = []
        self._seen: set[int] = set()

    def take(self, reply: Reply) -> ClientUpdate | None:
        """Return the update of a reply that may be aggregated, as a copy; reject the others with a reason."""
        reply, wrong = _judged(reply, self._expected, self._seen)
        known = reply.client is not None and reply.client in self._expected.uploads
        if reply.client is not None and known and (wrong is None or wrong[0] not in ("stale", "duplicate")):
            self._seen.add(reply.client)
        if wrong:
            self._rejected.append(Rejection(-1 if reply.client is None else reply.client, *wrong))
            return None
        update, stats, notes = _accept(reply, self._expected)
        self._stats[update.client] = stats
        self._notes += notes
        return update

    @property
    def good(self) -> list[int]:
        """The clients whose updates may be aggregated, in order."""
        return sorted(self._stats)

    def close(self, updates: Sequence[ClientUpdate]) -> Screened:
        """Return the outcome, when no more replies come.

        Args:
            updates: what is left of those that `take` returned: all, or what they were added up to.
        """
        answered = set(self._stats) | {r.client for r in self._rejected}
        silent = [c for c in sorted(self._expected.uploads) if c not in answered]
        lost = [Rejection(c, "no_reply", "dropped out or missed the deadline") for c in silent]
        return Screened(
            updates=tuple(sorted(updates, key=lambda u: u.client)),
            stats=tuple(self._stats[c] for c in self.good),
            rejected=tuple(sorted([*self._rejected, *lost], key=lambda r: (r.client, r.reason))),
            notes=tuple(sorted(self._notes)),
        )


def screen(replies: Sequence[Reply], expected: Expected) -> Screened:
    """Sort replies into updates that may be aggregated and rejections with a reason."""
    screening = Screening(expected)
    return screening.close([update for update in map(screening.take, replies) if update is not None])
