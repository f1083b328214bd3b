"""Settings that would have no effect with a method, or beside each other: each with the reason. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedtune.config import Config
from fedtune.config.load import changed
from fedtune.config.section import own_problems
from fedtune.methods.base import Method
from fedtune.methods.wrappers import WRAPPERS, named
from fedtune.types import Problem

Found = Iterator[tuple[str, str]]
ADAM = ("train.adam_beta1", "train.adam_beta2", "train.adam_epsilon")


def without_effect(config: Config, kind: type[Method]) -> Iterable[Problem]:
    """Yield a problem for each setting that is neither the protocol's nor the default, and changes nothing."""
    own = changed(config)
    for key, why in _reasons(config, kind):
        if key in own:
            yield Problem(f"{key} = {own[key]!r}", f"has no effect: {why}", "leave it out")


def _reasons(config: Config, kind: type[Method]) -> Found:
    yield from _of_training(config)
    for wrapper in (*WRAPPERS.own.values(), *named(config)):
        yield from wrapper.idle(config, kind)
    given = config.method.parameters
    if not list(own_problems("method", kind.name, kind.Parameters, given)):
        yield from kind.Parameters.model_validate(given).idle(config)


def _of_training(config: Config) -> Found:
    if config.train.optimizer != "adamw":
        yield from ((key, f'train.optimizer = "{config.train.optimizer}" has no such hyperparameter') for key in ADAM)
    if config.train.max_steps == 1:
        yield "drift.proximal_mu", "a round has one step, and it starts where the proximal term has no gradient"
    if config.federation.rounds == 1:
        yield "train.learning_rate_max", "the rate falls to learning_rate_min in the last round, and there is one round"
