"""The zoo: facts about the base models that federated fine-tuning is usually done on. No torch here."""

from __future__ import annotations

import errno
import functools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fedtune.config import Config
from fedtune.data import hub
from fedtune.machine import expanded
from fedtune.types import Problem, nearest

HEAD = "lm_head"  # of every architecture here; PEFT's `all-linear` leaves it out


@dataclass(frozen=True)
class BaseModel:
    """One base model.

    Attributes:
        id: on the Hub, or `packaged/...`.
        parameters: in millions, embeddings included once.
        licence: SPDX id or the vendor's own.
        architecture: the transformers class it loads as.
        hidden, layers, heads, kv_heads, head_dim, intermediate, vocab: the shape.
        targets: PEFT's default LoRA targets for the architecture.
        template: kind of chat template, or "none".
        revision: the pinned commit; empty where none was verified, and then a run cannot be ranked.
        gated: whether the Hub asks to accept terms.
        known_issues: what goes wrong with it, in a sentence.
        tags: domains it is made for.
    """

    id: str
    parameters: float
    licence: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    targets: tuple[str, ...]
    template: str
    revision: str = ""
    gated: bool = False
    known_issues: str = ""
    tags: tuple[str, ...] = ()

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (in, out) features of every linear layer by its path in the model, the language-model head last."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": query, "k_proj": key, "v_proj": key}
        mlp = {"gate_proj": self.intermediate, "up_proj": self.intermediate}
        if self.architecture == "Phi3ForCausalLM":
            attention, mlp = {"qkv_proj": query + 2 * key}, {"gate_up_proj": 2 * self.intermediate}
        one = {f"self_attn.{name}": (self.hidden, out) for name, out in attention.items()}
        one |= {f"mlp.{name}": (self.hidden, out) for name, out in mlp.items()}
        one |= {"self_attn.o_proj": (query, self.hidden), "mlp.down_proj": (self.intermediate, self.hidden)}
        each = {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in one.items()}
        return {**each, HEAD: (self.hidden, self.vocab)}


@functools.cache
def zoo() -> dict[str, BaseModel]:
    """Return all models of the zoo by id."""
    text = (resources.files("fedtune.models") / "zoo.toml").read_text(encoding="utf-8")
    models: dict[str, BaseModel] = {}
    for family in tomllib.loads(text)["family"]:
        for own in family.pop("models"):
            facts: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in (family | own).items()}
            models[facts["id"]] = BaseModel(**facts)
    return models


def is_local(name: str) -> bool:
    """Tell whether a model's name is a folder here."""
    try:
        return expanded(name).is_dir()
    except OSError as err:
        if err.errno == errno.ENAMETOOLONG:  # no folder can have that name
            return False
        raise


def problems(config: Config) -> Iterable[Problem]:
    """Yield what is wrong with the model's name before anything is loaded."""
    name = config.model.name
    if is_local(name) or name in zoo():
        return
    if name.startswith("packaged/") or name.count("/") != 1 or name.startswith((".", "/", "~")):
        fix = nearest(name, zoo()) or "name a folder, a Hub id (organisation/name) or one of: fedtune ls models"
        yield Problem(f'model.name = "{name}"', "no such folder or packaged model", fix)


LOCAL = "the base model is a local folder; only its hash is known"


def unranked_reasons(config: Config) -> tuple[str, ...]:
    """Say why the model alone keeps a run from being ranked."""
    known = zoo().get(config.model.name)
    if is_local(config.model.name):
        return (LOCAL,)
    if config.model.revision and not hub.is_commit(config.model.revision):
        return (f"model.revision {config.model.revision!r} is not a commit (40 digits), so it may move",)
    if not (config.model.revision or (known and known.revision)):
        return (f"{config.model.name} has no pinned revision; set model.revision to a commit",)
    return ()
