"""What a board is made of: one entry for each run, in git, rebuilt by anyone. Schema version 1."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from fedtune.config import Config
from fedtune.results.bounds import LARGEST, LARGEST_INT, MOST_REASON, MOST_TEXT, Amount, Count, plain_text, unbounded
from fedtune.results.schema import Arm, Arms, Document, Name

__all__ = ["Answers", "Arm", "Costs", "Entry", "Point", "Privacy", "State", "escape_markdown", "plain_text"]

State = Literal["reported", "re-scored", "re-run", "flagged"]
_SAFE = re.compile(r"[^A-Za-z0-9._@-]+")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>&|~#!$])|^([-+=]|\d+(?=[.)]))")
# what readers of Markdown link or replace although it is escaped: addresses, names, numbers of threads, emoji
_LINKED = re.compile(r"(?<=:)(?=\S)|(?<=@)(?=\S)|(?<=#)(?=\S)|(?<=\bGH-)(?=\d)|(?<=www)(?=\.)", re.I)
_BREAK = "&#8203;"  # of no width


def _escaped(found: re.Match[str]) -> str:
    return found[0] + "\\" if found[0].isdigit() else "\\" + found[0]


def escape_markdown(value: str) -> str:
    """Return a text so that Markdown and the HTML in it show it as it is, on one line: no link, image, code or tag.

    Addresses, names after `@` and numbers after `#` or `GH-` get a space of no width, since they are linked wherever
    they stand. The hash of a commit stays whole, to be copied.
    """
    return _LINKED.sub(_BREAK, _MARKDOWN.sub(_escaped, " ".join(value.split())))


class Costs(Document):
    """What a run took; null where nobody could read it.

    Attributes:
        bytes_up, bytes_down: on the wire, all clients and rounds.
        wall_seconds: training and evaluation, all attempts.
        gpu_seconds: wall seconds times devices.
        peak_memory_bytes: of the process.
        energy_joules: of the processor's package, where the system lets one read it.
        trainable_parameters: of the adapter.
        adapter_bytes: the size of the saved adapter.
    """

    bytes_up: Count = 0
    bytes_down: Count = 0
    wall_seconds: Amount | None = None
    gpu_seconds: Amount | None = None
    peak_memory_bytes: Count | None = None
    energy_joules: Amount | None = None
    trainable_parameters: Count | None = None
    adapter_bytes: Count | None = None


class Answers(Document):
    """Which items of a task were right, so that two entries can be compared item by item.

    Attributes:
        items_sha256: of the items' places and right answers; only equal ones may be paired.
        n: items.
        bits: one bit an item, most significant first, base64.
    """

    items_sha256: str
    n: Count
    bits: str = Field(max_length=100 * MOST_TEXT)

    @model_validator(mode="after")
    def _enough(self) -> Answers:
        if (bits := 8 * len(base64.b64decode(self.bits))) < self.n:
            raise ValueError(f"{bits} bits for {self.n} items")
        return self

    @classmethod
    def pack(cls, right: Sequence[bool], items_sha256: str) -> Answers:
        """Pack one flag an item."""
        raw = np.packbits(np.asarray(right, dtype=bool)).tobytes()
        return cls(items_sha256=items_sha256, n=len(right), bits=base64.b64encode(raw).decode())


def unpacked(bits: str, n: int) -> npt.NDArray[np.bool_]:
    """Return one flag an item, (items)."""
    raw = np.frombuffer(base64.b64decode(bits), dtype=np.uint8)
    return np.unpackbits(raw)[:n].astype(bool)


class Point(Document):
    """A score during the run."""

    round: Count
    task: Name
    mode: Name
    score: float | None


class Privacy(Document):
    """A differential-privacy guarantee: of whom, and how strong."""

    unit: Literal["client", "example"]
    epsilon: float = Field(gt=0, le=LARGEST)
    delta: float = Field(gt=0, lt=1)


class Entry(Document):
    """One run, or one published result.

    Attributes:
        kind: a run of this program, or somebody's published generations.
        team, title, link: who, what, where to read on. Plain text.
        state: reported (as its maker says), re-scored (from its samples), re-run (by somebody else), flagged.
        reasons: why it is flagged, or what a reader should doubt.
        base_millions: parameters of the base model.
        config, config_sha256, protocol, protocol_sha256: the settings that differ from the defaults (`settings` has
            all); empty for published results.
        arms: base model, federated and others, with their scores.
        answers: `arm/task/mode` -> which items were right.
        losses: mean training loss of each round.
        lost_clients, skipped_rounds: what went wrong on the way.
        samples_sha256: `task/mode` -> of what the ranked arm's models answered; an equal one is of the same run.
        claims: scores as the maker published them, by task, where they are not ours.
    """

    schema_version: Literal[1] = 1
    kind: Literal["run", "published"] = "run"
    team: str = Field("", max_length=80)
    title: str = Field("", max_length=160)
    link: str = Field("", max_length=300, pattern=r"^(https://[^\s\"'<>]+)?$")
    state: State = "reported"
    reasons: list[str] = Field(default_factory=list)
    domain: str = Field(max_length=80)
    base: str = Field(max_length=200)
    revision: str = Field("", max_length=80)
    base_millions: float | None = Field(None, gt=0, le=LARGEST)
    method: str = Field(max_length=80)
    seed: int | None = Field(None, ge=0, le=LARGEST_INT)
    config: dict[str, Any] = Field(default_factory=dict)
    config_sha256: str = ""
    protocol: str = ""
    protocol_sha256: str = ""
    unranked: list[str] = Field(default_factory=list)
    arms: Arms = Field(min_length=1)
    answers: dict[str, Answers] = Field(default_factory=dict)
    curve: list[Point] = Field(default_factory=list)
    losses: list[float | None] = Field(default_factory=list)
    rounds: Count = 0
    lost_clients: Count = 0
    skipped_rounds: Count = 0
    data: dict[str, Any] = Field(default_factory=dict)
    costs: Costs = Field(default_factory=Costs)
    privacy: Privacy | None = None
    code: dict[str, str | bool | None] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str | int | None] = Field(default_factory=dict)
    claims: dict[str, float] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    samples_sha256: dict[str, str] = Field(default_factory=dict)

    @field_validator("team", "title", "base", "method", "revision", "link", "domain", "protocol")
    @classmethod
    def _plain(cls, value: str) -> str:
        if value != value.strip():
            raise ValueError("begins or ends with blanks; write it without")
        return plain_text(value)

    @field_validator("reasons", "unranked")
    @classmethod
    def _plain_lines(cls, value: list[str]) -> list[str]:
        return [plain_text(line)[:MOST_REASON] for line in value]

    @model_validator(mode="after")
    def _bounded(self) -> Entry:
        if said := unbounded(self):
            raise ValueError(said)
        return self

    def arm(self, name: str) -> Arm | None:
        """Return an arm by name, if the entry has it."""
        return next((a for a in self.arms if a.name == name), None)

    @property
    def settings(self) -> Config:
        """All settings of a run: what `config` leaves out has its default. Raises ValueError where it is none's."""
        return Config.model_validate({"domain": self.domain, **self.config})

    @property
    def settings_or_none(self) -> Config | None:
        """The settings of a run; None for published results, and for what is no settings."""
        with contextlib.suppress(ValueError):
            return self.settings if self.config else None
        return None

    @property
    def main(self) -> Arm:
        """The arm that is ranked."""
        return self.arm("federated") or self.arms[-1]

    def same_samples(self, other: Entry) -> bool:
        """Tell whether two entries have the very same samples of a task."""
        return bool(self.samples_sha256.items() & other.samples_sha256.items())

    def place(self) -> Path:
        """Return the entry's path in the store: domain/base@revision/method/config/seed-n.json."""
        # where there are no settings, who and what make the place; cut and cleaned names must not meet
        who = hashlib.sha256(json.dumps([self.team, self.title]).encode()).hexdigest()[:8]
        recipe = self.config_sha256[:16] or f"{self.team}-{self.title}"[:50] + f"-{who}"
        base = f"{self.base}@{self.revision[:12]}" if self.revision else self.base
        seed = f"seed-{self.seed}" if self.seed is not None else "published"
        parts = [_SAFE.sub("-", part).strip("-.") or "unnamed" for part in (self.domain, base, self.method, recipe)]
        return Path(*parts, f"{seed}.json")
