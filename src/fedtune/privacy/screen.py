"""Screen every reply before it can touch the global model: one bad client changes nothing but the record.

Flower's own aggregation accepts NaN, broadcasts wrong shapes and dies of one odd reply; nothing reaches a
method here that has not passed this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.methods.base import ClientUpdate
from fedtune.methods.sound import unsound
from fedtune.types import ClientStats, Rejection


@dataclass(frozen=True)
class Reply:
    """What came back for one message, decoded but not yet trusted.

    Attributes:
        client: the client it was sent to, as the transport knows; None for a node never asked.
        claims: (run, round, client, exchange of the round) as the reply says.
        tensors: the update; None for an error reply.
        metrics: numbers by name.
        error: the client's traceback, if it failed.
    """

    client: int | None
    claims: tuple[str, int, int, int] | None
    tensors: Mapping[str, Tensor] | None
    metrics: Mapping[str, float]
    error: str = ""


@dataclass(frozen=True)
class Expected:
    """What a good reply of this round looks like.

    Attributes:
        run: the run's id.
        round: the round's number.
        signature: for each client asked, tensors with the right names, shapes and dtypes.
        registered: for each client, how many examples its shard has.
        weights: whether examples used or the whole shard weigh.
        flaw: says what is wrong with an update whose shapes are the client's choice; None where they are not.
        phase: which exchange of the round.
    """

    run: str
    round: int
    signature: Mapping[int, Mapping[str, Tensor]]
    registered: Mapping[int, int]
    weights: str = "examples-used"
    flaw: Callable[[Mapping[str, Tensor], int], str] | None = None
    phase: int = 1


@dataclass(frozen=True)
class Screened:
    """The updates that may be aggregated (sorted by client), their statistics, all rejections, and remarks."""

    updates: tuple[ClientUpdate, ...]
    stats: tuple[ClientStats, ...]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]


def _identity(reply: Reply, expected: Expected, seen: set[int]) -> tuple[str, str] | None:
    """Reject replies of strangers, of other rounds or runs, and second ones."""
    if reply.client is None or reply.client not in expected.signature:
        return "unknown_client", "the node was not asked this round"
    if reply.error:
        return "error", reply.error
    if reply.claims is None or reply.tensors is None:
        return "malformed", "the reply lacks its identity or its update"
    run, round_, client, phase = reply.claims
    if (run, round_, phase) != (expected.run, expected.round, expected.phase):
        now = f"run {expected.run} round {expected.round}.{expected.phase}"
        return "stale", f"answers run {run} round {round_}.{phase}, now is {now}"
    if client != reply.client:
        return "unknown_client", f"sent by client {reply.client}, claims to be {client}"
    return ("duplicate", "a second reply of this client") if client in seen else None


def _keys(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[str, str] | None:
    missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing or extra:
        return (
            "keys",
            f"missing {missing[:1] or 'none'}, unknown {extra[:1] or 'none'} ({len(missing)}/{len(extra)})",
        )
    return None


def _kinds(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[str, str] | None:
    for name, tensor in want.items():
        if got[name].dtype != tensor.dtype:
            return "dtype", f"{name}: got {got[name].dtype}, expected {tensor.dtype}"
    return None


def _shapes(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Reject by exact signature: a shape that would broadcast is as wrong as any other."""
    for name, tensor in want.items():
        if got[name].shape != tensor.shape:
            axis = 0 if ".lora_A" in name else 1
            ranked = got[name].dim() == 2 and ".lora_" in name and got[name].shape[1 - axis] == tensor.shape[1 - axis]
            if ranked:
                return "rank", f"{name}: rank {got[name].shape[axis]}, this client's is {tensor.shape[axis]}"
            return "shape", f"{name}: got {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
    return None


def _free_shapes(got: Mapping[str, Tensor], expected: Expected, client: int) -> tuple[str, str] | None:
    flaw = expected.flaw(got, client) if expected.flaw else ""
    return ("shape", flaw) if flaw else None


def _numbers(got: Mapping[str, Tensor]) -> tuple[str, str] | None:
    for name, tensor in got.items():
        # a finite sum has finite terms, and is several times cheaper to see; only another one has to be looked into
        if not math.isfinite(float(tensor.sum())) and not torch.isfinite(tensor).all():
            return "non_finite", f"{name} has NaN or infinity"
    flaw = unsound(got)
    return ("magnitude", flaw) if flaw else None


def _examples(reply: Reply) -> tuple[str, str] | None:
    examples = reply.metrics.get("examples", math.nan)
    if not math.isfinite(examples) or examples <= 0 or examples != int(examples):
        return "examples", f"examples = {examples}; must be a whole number above 0"
    return None


def _reason(reply: Reply, expected: Expected, seen: set[int]) -> tuple[str, str] | None:
    if odd := _identity(reply, expected, seen):
        return odd
    if reply.tensors is None or reply.client is None:
        return "malformed", "the reply has no update"
    want = expected.signature[reply.client]
    got = reply.tensors
    if odd := _keys(got, want) or _kinds(got, want):
        return odd
    shaped = _free_shapes(got, expected, reply.client) if expected.flaw else _shapes(got, want)
    return shaped or _numbers(got) or _examples(reply)


def _number(metrics: Mapping[str, float], name: str) -> int:
    value = metrics.get(name, 0.0)
    return int(value) if math.isfinite(value) else 0


def _accept(reply: Reply, expected: Expected) -> tuple[ClientUpdate, ClientStats, str]:
    """Turn a reply that passed into an update; more examples than the client registered are capped."""
    client, tensors = reply.client, reply.tensors
    if client is None or tensors is None:
        raise ValueError("only screened replies are accepted")
    claimed, registered = int(reply.metrics["examples"]), expected.registered[client]
    used = min(claimed, registered)
    note = f"client {client}: {claimed} examples capped to its {registered} registered" if claimed > used else ""
    loss = reply.metrics.get("loss")
    stats = ClientStats(
        client=client,
        examples=used,
        tokens=_number(reply.metrics, "tokens"),
        steps=_number(reply.metrics, "steps"),
        loss=loss if loss is not None and math.isfinite(loss) else None,
    )
    weight = registered if expected.weights == "shard-size" else used
    return ClientUpdate(client, tensors, weight), stats, note


class Screening:
    """Sorts the replies of one exchange as they come.

    A client that was asked and has no reply at all is rejected as `no_reply`. Metrics nobody asked for are ignored; a
    missing or non-finite loss becomes None.
    """

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._stats: dict[int, ClientStats] = {}
        self._rejected: list[Rejection] = []
        self._notes: list[str] = []
        self._seen: set[int] = set()

    def take(self, reply: Reply) -> ClientUpdate | None:
        """Return the update of a reply that may be aggregated; reject the others with a reason."""
        odd = _reason(reply, self._expected, self._seen)
        known = reply.client is not None and reply.client in self._expected.signature
        if reply.client is not None and known and (odd is None or odd[0] not in ("stale", "duplicate")):
            self._seen.add(reply.client)
        if odd:
            self._rejected.append(Rejection(-1 if reply.client is None else reply.client, *odd))
            return None
        update, stats, note = _accept(reply, self._expected)
        self._stats[update.client] = stats
        self._notes += [note] if note else []
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
        silent = [c for c in sorted(self._expected.signature) if c not in answered]
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
    taken = [screening.take(reply) for reply in replies]
    return screening.close([update for update in taken if update is not None])
