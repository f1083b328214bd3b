"""The exception family, and the small frozen values that cross layers. No torch here."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter


MOST_TOLD = 2_000  # characters of a problem


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural but for 1: `1 round`, `1,000 rounds`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class FedtuneError(Exception):
    """Base of every error a user can cause or repair. `exit_code` is what the command line exits with."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input: where it stands, what was found there, and what would repair it."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        # what was found may be of any length
        return plain(f"{self.where}: {self.what}" + (f"; {self.fix}" if self.fix else ""), MOST_TOLD)


class ProblemsError(FedtuneError):
    """All problems of something that was being read, its `title`, reported at once."""

    def __init__(self, title: str, problems: Sequence[Problem]) -> None:
        self.title = title
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{title} ({counted(len(problems), 'problem')})", *(f"  {p}" for p in problems)]))


class ConfigError(ProblemsError):
    """The settings are not valid."""

    exit_code = 2


class DataError(FedtuneError):
    """A data set cannot be used as it is."""


class CorruptFileError(FedtuneError):
    """A file is truncated, oversized or not what its name says; the message has the file and the place."""


class MissingFileError(CorruptFileError):
    """A file or folder that was named, or that another one needs, does not exist."""


class OfflineError(FedtuneError):
    """Something must be fetched and cannot be; the message says what and how to get it here."""


class ModelError(FedtuneError):
    """A base model cannot be found, loaded, or used as asked."""


class AdapterError(FedtuneError):
    """An adapter is unsafe to load or belongs to another base model."""


class ResumeError(FedtuneError):
    """A run cannot be continued as asked; the message has the difference."""


class LockedError(FedtuneError):
    """Another process works in this run folder."""


class RunFailedError(FedtuneError):
    """The run ended without doing its work (too few valid updates, nobody connected, score withheld)."""

    exit_code = 3


class UpdateError(FedtuneError):
    """One client's update cannot be aggregated, although its names, shapes and types are right.

    Raised by a method's server half, so that a round can go on without this client.

    Args:
        client: whose update it is.
        detail: what is wrong with it.
    """

    def __init__(self, client: int, detail: str) -> None:
        super().__init__(f"the update of client {client} cannot be aggregated: {detail}")
        self.client = client
        self.detail = detail


class CancelledError(BaseException):
    """The run was asked to stop (Ctrl-C or SIGTERM); everything up to the last round is on disk.

    Not an `Exception`: what turns a client's failure into a reply must not swallow it. Not a
    KeyboardInterrupt either: the command-line library would turn that into its own exit code.
    """

    def __init__(self, signal_number: int, remedy: str = "") -> None:
        super().__init__(f"cancelled by signal {signal_number}" + (f"; {remedy}" if remedy else ""))
        self.exit_code = 128 + signal_number


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `did you mean "x"?` for the closest of `known`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'did you mean "{match[0]}"?' if match else ""


def plain(text: str, most: int = 4000) -> str:
    """Return text from outside so that it can be stored, logged and shown on a terminal.

    Control characters (but line ends and tabs), marks that change the direction of writing, and lone surrogates are
    escaped. A text above `most` characters loses its middle: of a traceback, the beginning and the end say most.
    """
    if len(text) > most:
        head = most // 4
        text = f"{text[:head]} [... {len(text) - most} characters left out ...] {text[head - most :]}"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def last_line(text: str, most: int = 300) -> str:
    """Return the last line of a text from outside that says anything (of a traceback: the error), made `plain`."""
    lines = [line.strip() for line in plain(text).splitlines() if line.strip()]
    return plain(lines[-1], most) if lines else "no reason given"


def derive_seed(seed: int, *keys: str | int) -> int:
    """Return a 63-bit seed that depends on every key.

    Streams are keyed by what they are for ("sample", round, client …), so that no consumer's draws
    depend on how many draws another one made, nor on the order in which they run.
    """
    text = "/".join(str(k) for k in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Rejection:
    """Why one client's reply was not used: a short machine word and a sentence."""

    client: int
    reason: str
    detail: str


@dataclass(frozen=True)
class ClientStats:
    """What one client reports beside its update. `loss` is None when it was missing or not finite."""

    client: int
    examples: int
    tokens: int
    steps: int
    loss: float | None


@dataclass(frozen=True)
class RoundRecord:
    """One line of `rounds.jsonl`. Holds nothing that depends on the clock: a resumed run writes the same."""

    round: int
    status: str
    learning_rate: float
    cohort: tuple[int, ...]
    clients: tuple[ClientStats, ...]
    rejected: tuple[Rejection, ...]
    bytes_down: int
    bytes_up: int
    notes: tuple[str, ...] = field(default=())

    @property
    def loss(self) -> float | None:
        """Mean training loss of the clients used, weighted by examples; None when nobody reported one."""
        pairs = [(c.loss, c.examples) for c in self.clients if c.loss is not None]
        total = sum(n for _, n in pairs)
        return sum(x * n for x, n in pairs) / total if total else None

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain JSON types, with the mean loss spelled out."""
        return {**asdict(self), "loss": self.loss}

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> RoundRecord:
        """Read back what `as_json` wrote. Raises ValueError where a value is missing, or of another kind."""
        # JSON mode: lists become tuples; no other type is converted
        return _record_reader().validate_json(json.dumps(line), strict=True)


@functools.cache
def _record_reader() -> TypeAdapter[RoundRecord]:
    from pydantic import TypeAdapter

    return TypeAdapter(RoundRecord)
