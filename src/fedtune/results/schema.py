"""The files of a run folder, version 1. Scores are fractions; null means unknown, with the reason beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from fedtune.io import read_json, reading
from fedtune.results.bounds import as_reason

SCHEMA_VERSION = 1
RESULT = "result.json"
PATH_PART = r"^[a-z0-9][A-Za-z0-9._-]*$"
# of an arm, a task or a mode: part of a path, hence no separator, and no leading dot
Name = Annotated[str, Field(max_length=80, pattern=PATH_PART)]


class Document(BaseModel):
    """A part of a result file: unknown keys are refused and NaN is not a number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Score(Document):
    """One task in one mode.

    Attributes:
        metric: `accuracy`, `pass@1` of programs, or `nats_per_token` (mean log-likelihood of held-out
            solutions; higher is better).
        n: items scored, errors included.
        score: the metric; null if it was withheld.
        interval: 95 % bootstrap over items.
        strict: accuracy when only a clean answer counts (official mode).
        valid_rate: share of answers that could be read (official mode).
        macro_f1: for sentiment.
        errors: items that raised; they count as wrong.
        withheld: why there is no score.
        details: of programs: compile rate, the share of each outcome, pass@k.
        trivial: accuracy of answers that need no model: the majority class and always the same one.
    """

    task: Name
    mode: Name
    metric: str = "accuracy"
    n: int
    score: float | None
    interval: tuple[float, float] | None = None
    strict: float | None = None
    valid_rate: float | None = None
    macro_f1: float | None = None
    errors: int = 0
    withheld: str = ""
    trivial: dict[str, float] = Field(default_factory=dict)
    details: dict[str, float] = Field(default_factory=dict)
    items_sha256: str = ""

    @field_validator("withheld")
    @classmethod
    def _legible(cls, value: str) -> str:
        return as_reason(value)

    @property
    def key(self) -> str:
        """What it is called in files: `task/mode`."""
        return f"{self.task}/{self.mode}"

    @property
    def title(self) -> str:
        """What it is called for people: `task (mode)`."""
        return f"{self.task} ({self.mode})"


def _once(scores: list[Score]) -> list[Score]:
    if twice := [key for key, n in Counter(s.key for s in scores).items() if n > 1]:
        raise ValueError(f"{twice[0][:200]} is scored more than once")
    return scores


def withheld(scores: Iterable[Score]) -> dict[str, str]:
    """Return why scores are withheld, by `task/mode`; nothing of those that are known."""
    return {s.key: s.withheld or "unknown" for s in scores if s.score is None}


class Arm(Document):
    """One way to get a model, and its scores: base, federated, local-only, centralised.

    Where every client has a model of its own (local-only, personalised methods), `per_client` has each client's
    score by `task/mode`, and `scores` their means. `failed` has each client without a model, and why: it failed
    whenever it was asked, or was never asked; it is in none of the means.
    """

    name: Name
    scores: Annotated[list[Score], AfterValidator(_once)]
    steps: int = 0
    per_client: dict[str, list[float | None]] = Field(default_factory=dict)
    failed: dict[int, str] = Field(default_factory=dict)

    def like(self, score: Score) -> Score | None:
        """Return this arm's score of the same task and mode, if it has one."""
        return next((s for s in self.scores if (s.task, s.mode) == (score.task, score.mode)), None)

    def of_clients(self, score: Score) -> list[float]:
        """Return the clients' own scores of a task and mode, those that are known."""
        return [v for v in self.per_client.get(score.key, []) if v is not None]


def _named_once(arms: list[Arm]) -> list[Arm]:
    if twice := [name for name, n in Counter(arm.name for arm in arms).items() if n > 1]:
        raise ValueError(f"the arm {twice[0][:200]} is there more than once")
    return arms


Arms = Annotated[list[Arm], AfterValidator(_named_once)]


class Result(Document):
    """`result.json`: everything a reader needs to doubt the numbers."""

    schema_version: int = SCHEMA_VERSION
    domain: str
    protocol: str
    protocol_sha256: str
    config_sha256: str
    config: dict[str, Any]
    unranked: list[str]
    method: str
    model: str
    revision: str
    data: dict[str, Any]
    seed: int
    arms: Arms
    rounds: int
    skipped_rounds: int
    lost_clients: int
    bytes_down: int
    bytes_up: int
    bytes_predicted: int | None
    trainable_parameters: int
    _folder: Path | None = PrivateAttr(None)

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Read the result of a run folder. Raises CorruptFileError."""
        path = folder / RESULT
        with reading(path):
            made = cls.model_validate(read_json(path))
        made._folder = folder
        return made

    @property
    def folder(self) -> Path | None:
        """The run folder it was read from."""
        return self._folder

    @property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """Each arm's scores by `task/mode`."""
        return {arm.name: {s.key: s.score for s in arm.scores} for arm in self.arms}
