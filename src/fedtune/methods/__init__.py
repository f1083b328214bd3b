"""The methods, by explicit list. Adding one is a file and a line here. No torch here."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from fedtune.config import Config
from fedtune.methods.base import ClientUpdate, Method, ServerState
from fedtune.methods.fedit import FedIT
from fedtune.methods.fedprox import FedProx
from fedtune.methods.fedrot_lora import FedRotLoRA
from fedtune.methods.fedsvd import FedSVD
from fedtune.methods.ffa_lora import FFALoRA
from fedtune.methods.flexlora import FlexLoRA
from fedtune.methods.lora_fair import LoRAFAIR
from fedtune.methods.rolora import RoLoRA
from fedtune.types import Problem, nearest

_ALL: tuple[type[Method], ...] = (FedIT, FedProx, FFALoRA, RoLoRA, FlexLoRA, LoRAFAIR, FedSVD, FedRotLoRA)
METHODS: dict[str, type[Method]] = {m.name: m for m in _ALL}

__all__ = ["METHODS", "ClientUpdate", "Method", "ServerState", "create", "problems"]


def problems(config: Config) -> Iterable[Problem]:
    """Yield what is wrong with the method's name and settings; one without effect is refused."""
    name = config.method.name
    if name not in METHODS:
        fix = nearest(name, METHODS) or "list them: fedtune ls methods"
        yield Problem(f'method.name = "{name}"', "unknown method", fix)
        return
    kind = METHODS[name]
    if config.lora.dora and not kind.dora:
        able = ", ".join(m for m in METHODS if METHODS[m].dora)
        yield Problem("lora.dora", f"{name} is not defined for DoRA's magnitudes", f"these are: {able}")
    try:
        parameters = kind.Parameters.model_validate(config.method.parameters)
    except ValidationError as err:
        for error in err.errors():
            key = str(error["loc"][0])
            if error["type"] == "extra_forbidden":
                fix = nearest(key, kind.Parameters.model_fields) or f"{name} has no such setting"
                yield Problem(f"method.{key}", "unknown key", fix)
            else:
                yield Problem(f"method.{key} = {error['input']!r}", error["msg"])
        return
    if reason := kind.inert(parameters):
        yield Problem(f"method ({name})", f"has no effect: {reason}", "use fedit, or a value above 0")


def create(config: Config) -> Method:
    """Return the method a run asks for. The settings have passed `problems`."""
    kind = METHODS[config.method.name]
    return kind(kind.Parameters.model_validate(config.method.parameters))
