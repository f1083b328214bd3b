"""An adapter's settings: each field of PEFT is applied, known to change nothing, or refused by name. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedtune.io import read_json
from fedtune.models.patterns import Pattern, malformed
from fedtune.models.source import CONFIG
from fedtune.types import AdapterError

Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(ge=1e-6, le=1e6)]
# PEFT holds each of a list's names against every other and every layer, so its time grows with the square of them
MOST_NAMES = 4096
# of the file: what it makes takes some thirty times the room, and settings of 4096 layers by name are smaller
MOST_BYTES = 2 * 1024**2
Text = Annotated[str, Field(max_length=10_000)]
Names = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=MOST_NAMES)]

# about a file, or read by PEFT only where another field is set
DESCRIBES = {"auto_mapping", "peft_version", "inference_mode", "runtime_config"}
DESCRIBES |= {"megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# what a LoRA pass does not do; these have to be off
REFUSED = {"modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "lora_bias"}
REFUSED |= {"ensure_weight_tying", "use_qalora", "use_bdlora", "megatron_config", "arrow_config", "kasa_config"}
REFUSED |= {"velora_config", "monteclora_config", "alora_invocation_tokens"}
# starting values that leave the base model's weights as they are; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move them
INITS = (True, False, None, "gaussian", "orthogonal", "eva")

MERGE = "merge it where it was trained (PEFT's merge_and_unload, then save_pretrained) and evaluate what comes out"


class AdapterConfig(BaseModel):
    """The fields of `adapter_config.json` that decide what an adapter of any kind computes, by PEFT's names."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    kind: ClassVar[str]

    target_modules: Names | Text | None = None
    exclude_modules: Names | Text | None = None
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _patterns(self) -> Self:
        if wrong := malformed(self.patterns):
            raise ValueError(wrong)
        return self

    @property
    def patterns(self) -> list[Pattern]:
        """All regular expressions in the settings, as PEFT makes them."""
        fields = ("target_modules", "exclude_modules", "feedforward_modules")
        texts = ((field, getattr(self, field, None)) for field in fields)
        return [Pattern(field, text, text, whole=True) for field, text in texts if isinstance(text, str)]

    @property
    def base(self) -> str:
        """The base model's name, or an empty text."""
        return self.base_model_name_or_path or ""

    def is_of(self, base: str) -> bool:
        """Tell whether a base model may be the one meant; folders are compared by their last part, on any machine."""
        return self.base == base or Path(self.base).name == Path(base).name

    def for_peft(self) -> dict[str, Any]:
        """Return the arguments of PEFT's own settings."""
        return self.model_dump(exclude={"base_model_name_or_path", "revision"})


class LoraAdapterConfig(AdapterConfig):
    """Of a LoRA adapter.

    A pattern in `rank_pattern` or `alpha_pattern` gives the layers it matches a rank or an alpha of their own.
    """

    kind: ClassVar[str] = "LORA"

    r: Rank
    lora_alpha: Alpha
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names | Text | None = None
    rank_pattern: Annotated[dict[Text, Rank], Field(max_length=MOST_NAMES)] | None = None
    alpha_pattern: Annotated[dict[Text, Alpha], Field(max_length=MOST_NAMES)] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def patterns(self) -> list[Pattern]:
        """All regular expressions in the settings, as PEFT makes them."""
        found = super().patterns
        for field in ("rank_pattern", "alpha_pattern"):
            found += [Pattern(field, text, rf"(.*\.)?({text})$") for text in getattr(self, field) or ()]
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        return found + [Pattern("layers_pattern", t, rf"(?:^|.*?\.){t}\.(?P<idx>\d+)\.") for t in layers]

    def for_peft(self) -> dict[str, Any]:
        """Return the arguments of PEFT's LoraConfig."""
        patterns = {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}
        return super().for_peft() | patterns


class IA3AdapterConfig(AdapterConfig):
    """Of an IA3 adapter: of the layers in `feedforward_modules` the input is scaled, of the others the output."""

    kind: ClassVar[str] = "IA3"

    feedforward_modules: Names | Text | None = None


KINDS: dict[str, type[AdapterConfig]] = {kind.kind: kind for kind in (LoraAdapterConfig, IA3AdapterConfig)}
CHECKED = {"peft_type", "task_type", "bias", "init_lora_weights"}
# the start of IA3's vectors, which those of the file replace
DESCRIBES |= {"init_ia3_weights"}
KNOWN = {name: {*kind.model_fields, *CHECKED, *DESCRIBES, *REFUSED} for name, kind in KINDS.items()}


def _not_applied(config: Mapping[str, Any], known: Set[str]) -> list[str]:
    """Return what the settings ask for and would not get, each with its name."""
    found = [f"{name} = {short(config[name])} is not applied" for name in sorted(REFUSED & set(config)) if config[name]]
    if config.get("bias", "none") != "none":
        found.append(f"bias = {short(config['bias'])} is not applied")
    if (init := config.get("init_lora_weights")) not in INITS:
        found.append(f"init_lora_weights = {short(init)}: the adapter belongs to base weights that its start has moved")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        found.append(f"task_type = {short(config['task_type'])} is no language model's")
    unknown = [name for name in sorted(set(config) - known) if config[name]]
    return found + [f"{name} = {short(config[name])} is a field that is not known here" for name in unknown]


def read_config(folder: Path) -> AdapterConfig:
    """Read a folder's adapter_config.json, whoever wrote it.

    Raises:
        AdapterError: no adapter of a kind in `KINDS`, malformed, or a field that is not applied, by name.
        CorruptFileError: not JSON, or of more than `MOST_BYTES`.
    """
    config = read_json(folder / CONFIG, MOST_BYTES)
    if not isinstance(config, dict):
        raise AdapterError(f"{folder}: {CONFIG} is not a JSON object")
    kind = KINDS.get(str(config.get("peft_type", "")).upper())
    if kind is None:
        said = f"peft_type = {short(config.get('peft_type'))}; only adapters of {' and '.join(KINDS)} are read"
        raise AdapterError(f"{folder}: {said}")
    if ignored := _not_applied(config, KNOWN[kind.kind]):
        raise AdapterError(f"{folder}: {CONFIG}: {'; '.join(ignored)}; {MERGE}")
    try:
        return kind.model_validate({k: v for k, v in config.items() if k in kind.model_fields})
    except ValidationError as err:
        told = [": ".join([*map(str, e["loc"][:1]), e["msg"].removeprefix("Value error, ")]) for e in err.errors()]
        raise AdapterError(f"{folder}: {CONFIG}: {'; '.join(dict.fromkeys(told))}") from err
