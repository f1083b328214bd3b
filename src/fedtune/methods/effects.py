"""Settings that would have no effect with a method, or beside each other: each with the reason. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedtune.config import Config
from fedtune.config.load import changed
from fedtune.methods.base import Method
from fedtune.methods.wrappers import WRAPPERS, named
from fedtune.types import Problem

Found = Iterator[tuple[str, str]]
ADAM = ("train.adam_beta1", "train.adam_beta2", "train.adam_epsilon")
STEPS = (
    *("train.optimizer", "train.learning_rate_max", "train.learning_rate_min", "train.max_grad_norm"),
    *("train.weight_decay", *ADAM, "drift.proximal_mu", "lora.dropout"),
)


def without_effect(config: Config, kind: type[Method]) -> Iterable[Problem]:
    """Yield a problem for each setting that is neither the protocol's nor the default, and changes nothing."""
    own = changed(config)
    for key, why in _reasons(config, kind):
        if key in own:
            yield Problem(f"{key} = {own[key]!r}", f"has no effect: {why}", "leave it out")


def _reasons(config: Config, kind: type[Method]) -> Found:
    yield from _of_training(config, kind)
    for wrapper in (*WRAPPERS.own.values(), *named(config)):
        yield from wrapper.idle(config, kind)
    yield from _of_the_method(config, kind)


def _of_training(config: Config, kind: type[Method]) -> Found:
    if not kind.optimises:
        yield from ((key, f"{kind.name} makes no optimiser steps, only losses are computed") for key in STEPS)
    if config.train.optimizer != "adamw":
        yield from ((key, f'train.optimizer = "{config.train.optimizer}" has no such hyperparameter') for key in ADAM)
    if config.train.max_steps == 1:
        yield "drift.proximal_mu", "a round has one step, and it starts where the proximal term has no gradient"
    if config.federation.rounds == 1:
        yield "train.learning_rate_max", "the rate falls to learning_rate_min in the last round, and there is one round"


def _of_the_method(config: Config, kind: type[Method]) -> Found:
    ranks = config.lora.ranks or (config.lora.r,)
    if kind.name == "lora_a2" and config.lora.ranks:
        yield "method.share", "lora.ranks gives every client a budget of its own"
    if kind.name == "hetlora" and max(ranks) == 1:
        yield from ((f"method.{key}", "a client of rank 1 has nothing to prune") for key in ("regulariser", "gamma"))
    yield from _of_limits(config, kind)


def _of_limits(config: Config, kind: type[Method]) -> Found:
    """Yield each limit on columns that no round, or no run, can reach."""
    asked, rank, rounds = config.federation.cohort_size, config.lora.r, config.federation.rounds
    own = config.method.parameters
    reached: dict[str, tuple[int, str]] = {}
    if kind.name == "fedex_lora":
        reached["residual_rank"] = max((asked - 1) * rank, 1), "the residual of a round has a rank of at most"
    if kind.name == "fedask":
        reached["width"] = (
            asked * rank,
            "the mean of a round, which the default is wide enough for, has a rank of at most",
        )
    if kind.keeps_base:  # the unchanged model may stand beside a round's clients, where their changes are clipped
        reached["base_rank"] = rounds * (asked + 1) * rank, f"in {rounds} rounds a layer's side adapters have at most"
    for key, (most, why) in reached.items():
        limit = own.get(key)
        if isinstance(limit, int) and limit >= most:
            yield f"method.{key}", f"{why} {most}{' columns' if key == 'base_rank' else ''}"
