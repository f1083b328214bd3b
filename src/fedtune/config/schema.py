"""Every setting, its type, its limits and its default. A default stands here and nowhere else.

Training settings have the names of Hugging Face's `TrainingArguments`; adapter settings those of PEFT.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from fedtune.config.rows import DataSettings, PromptSettings
from fedtune.config.section import Chosen, Section
from fedtune.io import digest

Mode = Literal["official", "likelihood"]
Share = Annotated[float, Field(ge=0, lt=1)]
# the rows of one client's round are planned as a list
MOST_ROWS = 10_000_000


class ModelSettings(Section):
    """The base model: a name of the zoo, a Hub id, or a local folder."""

    name: str = "packaged/smollm2-135m-instruct"
    revision: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal[0, 4, 8] = 0


class LoraSettings(Section):
    """The adapter. An empty `target_modules` takes PEFT's default for the architecture.

    `ranks` gives clients ranks of their own, at most r: one for each client, or shares such as {4 = 0.5, 16 = 0.5}
    that a seeded draw hands out.
    """

    r: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32.0, ge=1e-6, le=1e6)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    ranks: tuple[int, ...] | dict[int, float] = ()

    @field_validator("ranks")
    @classmethod
    def _ranks(cls, value: tuple[int, ...] | dict[int, float]) -> tuple[int, ...] | dict[int, float]:
        if any(rank < 1 for rank in value):
            raise ValueError("ranks are 1 or more")
        if isinstance(value, dict) and value and abs(sum(value.values()) - 1) > 1e-6:
            raise ValueError(f"the shares of ranks sum to {sum(value.values()):g}, not to 1")
        return value

    @model_validator(mode="after")
    def _largest_rank(self) -> LoraSettings:
        if self.ranks and max(self.ranks) > self.r:
            raise ValueError(f"a client's rank {max(self.ranks)} is above the global rank r = {self.r}")
        return self


class PeftSettings(Chosen):
    """What is trained, by the name of a space, and the space's own settings; those of LoRA stand in `lora`."""

    kind: str = "lora"


class MethodSettings(Chosen):
    """The federated method and its own settings."""

    name: str = "fedit"


class ObjectiveSettings(Chosen):
    """What training minimises, and its own settings."""

    name: str = "cross-entropy"


class DriftSettings(Section):
    """Corrections of client drift: FedProx's proximal term, and SCAFFOLD's control variates (SGD only)."""

    proximal_mu: float = Field(0.0, ge=0)
    scaffold: bool = False


class ServerSettings(Section):
    """The server's optimiser. Numbers left at "default" are the convention's."""

    optimizer: Literal["none", "fedavgm", "fedadagrad", "fedyogi", "fedadam"] = "none"
    convention: Literal["openfedllm", "flower"] = "openfedllm"
    learning_rate: PositiveFloat | Literal["default"] = "default"
    beta1: Share | Literal["default"] = "default"
    beta2: Share | Literal["default"] = "default"
    tau: PositiveFloat | Literal["default"] = "default"


class RobustSettings(Section):
    """A robust rule on the updates' Gram matrix, against at most `malicious` clients per round.

    `clip_norm` bounds the norm of each update: a number, or "median" of the round's norms.
    """

    rule: Literal["none", "krum", "multi-krum", "geometric-median", "trimmed", "foolsgold", "dnc"] = "none"
    malicious: int = Field(1, ge=0)
    clip_norm: Literal["none", "median"] | PositiveFloat = "none"
    iterations: int = Field(10_000, ge=1)


class AttackSettings(Section):
    """Scripted attackers: which clients do what, and how strongly."""

    kind: Literal["none", "sign-flip", "boost", "random", "gauge", "label-flip"] = "none"
    clients: tuple[int, ...] = ()
    scale: float = Field(10.0, gt=0)


class FaultSettings(Section):
    """A seeded plan of simulated faults: the share of client calls that drop out, straggle or fail."""

    dropout: float = Field(0.0, ge=0, le=1)
    straggler: float = Field(0.0, ge=0, le=1)
    error: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _shares(self) -> FaultSettings:
        if self.dropout + self.straggler + self.error > 1:
            raise ValueError("dropout, straggler and error are shares of all calls and sum to at most 1")
        return self


class FederationSettings(Section):
    """Clients, rounds, and what happens when clients fail."""

    clients: int = Field(4, ge=1, le=1_000_000)
    rounds: int = Field(4, ge=1, le=100_000)
    fraction: float = Field(1.0, gt=0, le=1)
    min_clients: int = Field(1, ge=1)
    max_skipped_rounds: int = Field(3, ge=1)
    deadline: float = Field(3600.0, gt=0)
    connect_timeout: float = Field(60.0, gt=0)
    weights: Literal["examples-used", "shard-size"] = "examples-used"
    keep_checkpoints: int = Field(2, ge=1)
    faults: FaultSettings = FaultSettings()

    @property
    def cohort_size(self) -> int:
        """Clients asked in a round: `int(clients * fraction)`, as Flower's FedAvg does, but at least one."""
        return max(1, int(self.clients * self.fraction + 1e-9))

    @model_validator(mode="after")
    def _enough_clients(self) -> FederationSettings:
        if self.min_clients > self.cohort_size:
            raise ValueError(f"min_clients = {self.min_clients} but only {self.cohort_size} are asked per round")
        return self


class TrainSettings(Section):
    """One client's local work in one round."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate_max: float = Field(1e-3, gt=0)
    learning_rate_min: float = Field(1e-4, ge=0)
    max_steps: int = Field(6, ge=1, le=MOST_ROWS)
    per_device_train_batch_size: int = Field(8, ge=1, le=MOST_ROWS)
    gradient_accumulation_steps: int = Field(1, ge=1, le=MOST_ROWS)
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_length: int = Field(512, ge=8)
    labels: Literal["offsets", "template-tokens"] = "offsets"
    train_eos: bool = True
    rows: Literal["fresh", "repeat"] = "fresh"

    @property
    def batch(self) -> int:
        """Examples of an optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _rates(self) -> TrainSettings:
        if (rows := self.max_steps * self.batch) > MOST_ROWS:
            raise ValueError(f"a client has {rows:,} rows per round (steps x batch); at most {MOST_ROWS:,} are taken")
        if self.learning_rate_min > self.learning_rate_max:
            raise ValueError("learning_rate_min is larger than learning_rate_max")
        return self


class EngineSettings(Section):
    """How this machine does the work. Nothing here changes a number but by rounding; "auto" is planned at the start.

    `executor` trains clients one after the other, `cohort` of them in one pass, or (ray) side by side in the actors of
    Flower's simulation, on `devices` or all there are. A pass takes at most `max_tokens_per_forward` tokens; texts
    attend together where padding wastes fewer than `bucket` query-key pairs; `threads` 0 is one for each core.
    """

    executor: Literal["auto", "sequential", "cohort", "ray"] = "auto"
    cohort: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    max_tokens_per_forward: Annotated[int, Field(ge=64)] | Literal["auto"] = "auto"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    bucket: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    threads: int = Field(0, ge=0, le=4096)
    devices: tuple[Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")], ...] = ()

    @property
    def side_by_side(self) -> bool:
        """Whether clients are trained in processes of their own."""
        return self.executor == "ray" or bool(self.devices)

    @model_validator(mode="after")
    def _effects(self) -> EngineSettings:
        if self.executor in ("sequential", "ray") and self.cohort not in ("auto", 1):
            raise ValueError(f"cohort = {self.cohort} has no effect with executor = {self.executor}")
        if self.devices and self.executor not in ("auto", "ray"):
            raise ValueError(f"devices have no effect with executor = {self.executor}; say ray, or leave it out")
        gpus = [d for d in self.devices if d != "cpu"]
        if gpus and (len(gpus) < len(self.devices) or len(set(gpus)) < len(gpus)):
            raise ValueError(f"devices are all cpu, or all GPUs, each once; got {', '.join(self.devices)}")
        return self


class EvalSettings(Section):
    """What is evaluated and how. `limit` 0 means every item; a limit takes a seeded sample in file order."""

    tasks: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ("likelihood", "official")
    limit: int = Field(0, ge=0)
    official_limit: int = Field(0, ge=0)
    prompt: Literal["training", "official", "chat"] = "training"
    base: bool = True
    every: int = Field(0, ge=0)
    samples: int = Field(1, ge=1, le=1000)
    max_new_tokens: int = Field(512, ge=1)
    max_error_rate: float = Field(0.01, ge=0, le=1)


class Config(Section):
    """All settings of one run."""

    domain: str
    protocol: str = "quickstart"
    arm: Literal["federated", "local-only", "centralised"] = "federated"
    seed: int = Field(42, ge=0)
    model: ModelSettings = ModelSettings()
    peft: PeftSettings = PeftSettings()
    lora: LoraSettings = LoraSettings()
    method: MethodSettings = MethodSettings()
    drift: DriftSettings = DriftSettings()
    server: ServerSettings = ServerSettings()
    robust: RobustSettings = RobustSettings()
    attack: AttackSettings = AttackSettings()
    wrappers: dict[str, dict[str, Any]] = Field({})  # of other packages, by name; each with settings of its own
    data: DataSettings = DataSettings()
    prompt: PromptSettings = PromptSettings()
    federation: FederationSettings = FederationSettings()
    train: TrainSettings = TrainSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    eval: EvalSettings = EvalSettings()
    engine: EngineSettings = EngineSettings()

    def plain(self) -> dict[str, Any]:
        """Return the settings as nested plain JSON types."""
        return self.model_dump(mode="json")

    def semantic(self) -> dict[str, Any]:
        """Return what decides the result and differs from the defaults; `Config.model_validate` makes it whole again.

        A setting that is added later, with a default that keeps to what was done before, leaves it and the hash as they
        are; so a default never changes. Where this machine keeps its files, and how it works, is left out: the rows
        are identified by the data hash in the manifest, not by a path.
        """
        found = self.model_dump(mode="json", exclude={"engine": True, "data": {"path"}}, exclude_defaults=True)
        return {key: value for key, value in found.items() if value != {}}

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON of the semantic settings."""
        return digest(self.semantic())
