"""Solvers: what asks a model, in the ways there are to ask one. The scorers read what comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fedtune.config import Config
from fedtune.evaluation import generate, likelihood, official
from fedtune.evaluation.generate import Decoding
from fedtune.evaluation.items import TaskItems
from fedtune.evaluation.scorers.base import Solver

TEMPERATURE, TOP_P = 0.2, 0.95  # of the official evaluation of programs


class Likelihoods(Solver):
    """The likelihood of each of an item's answers, as a list for each item.

    Args:
        wrap: the official prompt around an item's own.
    """

    size = 32

    def __init__(self, wrap: Callable[[str], str]) -> None:
        self._wrap = wrap

    def check(self, tokenizer: Any, config: Config) -> None:
        """Refuse `eval.prompt = "chat"` for a model that cannot be asked so."""
        likelihood.check_prompt(tokenizer, config)

    def answers(
        self, model: Any, tokenizer: Any, loaded: TaskItems, first: int, last: int, config: Config
    ) -> Iterator[list[list[float]]]:
        """Yield likelihoods."""
        return likelihood.score(model, tokenizer, loaded.items[first:last], self._wrap, config)


class Choices(Solver):
    """The few tokens that a model writes after a question, as FlowerTune's evaluation asks for them."""

    size, whole = official.CHOICE_BATCH, True

    def answers(
        self, model: Any, tokenizer: Any, loaded: TaskItems, first: int, last: int, config: Config
    ) -> Iterator[list[str]]:
        """Yield outputs."""
        return official.choose(model, tokenizer, loaded.items[first:last])


class Sentiments(Solver):
    """The text that a model writes after FlowerTune's sentiment prompts, to where its label is fixed."""

    size, whole = official.SENTIMENT_BATCH, True

    def answers(
        self, model: Any, tokenizer: Any, loaded: TaskItems, first: int, last: int, config: Config
    ) -> Iterator[list[str]]:
        """Yield outputs."""
        return official.sentiment(model, tokenizer, loaded.items[first:last], loaded.task.max_new_tokens, first)


class Completions(Solver):
    """Completions of an item's prompt to one of the task's stop words, as a list of texts for each item.

    Args:
        sampled: `eval.samples` of each, drawn in float32 as the leaderboard's harness does; else one, greedily.
    """

    size = generate.BATCH

    def __init__(self, *, sampled: bool = False) -> None:
        self._sampled = sampled

    def prepared(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Return the context with the precision."""
        return _float32(model) if self._sampled else contextlib.nullcontext()

    def answers(
        self, model: Any, tokenizer: Any, loaded: TaskItems, first: int, last: int, config: Config
    ) -> Iterator[list[list[str]]]:
        """Yield completions."""
        task, prompts = loaded.task, [item.prompt for item in loaded.items[first:last]]
        greedy = Decoding(length=task.length, new_tokens=config.eval.max_new_tokens)
        decoding = Decoding(TEMPERATURE, TOP_P, length=task.length) if self._sampled else greedy
        samples = config.eval.samples if self._sampled else 1
        stops = [task.stop] * len(prompts)
        return generate.complete(model, tokenizer, prompts, stops, decoding, samples, loaded.places[first:last])


@contextlib.contextmanager
def _float32(model: Any) -> Iterator[None]:
    """Hold the weights in float32, and give them back after.

    A quantised base stays as it is: its weights exist in no other form here.
    """
    halves = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    dtypes = [p.dtype for p in halves]
    for parameter in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in zip(halves, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
