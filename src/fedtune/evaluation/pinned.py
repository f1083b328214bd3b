"""What FlowerTune's sentiment evaluation and transformers 4.53 make of a model and its tokenizer before they generate.

A tokenizer without a padding token of its own gets `[PAD]`, and the model's vocabulary is resized to the tokenizer's
length: rows are added, each the mean of all rows before, or the rows that the tokenizer has no token for are cut off.
Here the model's weights stay as they are; hooks give what the resized model would.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fedtune.models.interface import inner

PAD = "[PAD]"
# rows of an embedding that are looked up at a time to find their mean
CHUNK = 4096

Context = Callable[[], AbstractContextManager[Any]]


def padding_tokenizer(tokenizer: Any) -> Any:
    """Return what the evaluation pads with: a copy with `[PAD]` of a tokenizer that would pad with EOS or nothing."""
    if tokenizer.pad_token and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    padder = copy.deepcopy(tokenizer)
    padder.add_special_tokens({"pad_token": PAD})
    return padder


def _mean_row(embedding: Any, rows: int) -> Tensor:
    """Return the mean output [hidden] of an embedding over all its rows; of whatever kind it is, none is copied."""
    ids = torch.arange(rows, device=embedding.weight.device)
    sums = [embedding(part).sum(0, dtype=torch.float32) for part in torch.split(ids, CHUNK)]
    return torch.stack(sums).sum(0) / rows


class Resized:
    """A causal language model with a vocabulary of another size, for as long as `active()` holds.

    The reference draws an added row from a normal distribution around the mean with a billionth of the rows'
    covariance; here it is the mean itself. A logit of the mean of a head's rows is the mean of its logits.

    Args:
        model: bare or wrapped by PEFT; embeddings and head tied or not, adapted or not, in any precision.
        size: the number of tokens.
    """

    def __init__(self, model: Any, size: int) -> None:
        base = inner(model)
        self._embedding, self._head = base.get_input_embeddings(), base.get_output_embeddings()
        self._config = base.config.get_text_config()
        self._size, self._rows = size, int(self._embedding.weight.shape[0])
        self._added = _mean_row(self._embedding, self._rows) if size > self._rows else None
        self._asked: Tensor | None = None
        tied = self._head.weight is self._embedding.weight
        bias = getattr(self._head, "bias", None)
        # the bias of a tied head is filled up with zeros; that of one of its own with the mean
        self._offset = float(bias.float().mean()) if tied and bias is not None else 0.0

    def _before(self, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._asked = args[0]
        return (args[0].clamp(max=self._rows - 1), *args[1:])

    def _after(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._asked is None or self._added is None:
            return output
        return torch.where((self._asked >= self._rows).unsqueeze(-1), self._added.to(output), output)

    def _logits(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        missing = self._size - output.shape[-1]
        if missing <= 0:
            return output[..., : self._size]
        mean = output.mean(-1, keepdim=True, dtype=torch.float32) - self._offset
        return torch.cat([output, mean.to(output.dtype).expand(*output.shape[:-1], missing)], dim=-1)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the model have the new size; its weights are not touched."""
        hooks = [self._head.register_forward_hook(self._logits)]
        if self._added is not None:
            hooks.append(self._embedding.register_forward_pre_hook(self._before))
            hooks.append(self._embedding.register_forward_hook(self._after))
        was, self._config.vocab_size = self._config.vocab_size, self._size
        try:
            yield
        finally:
            self._config.vocab_size = was
            for hook in hooks:
                hook.remove()


def vocabulary(model: Any, tokenizer: Any, padder: Any) -> Context:
    """Return the context in which a model has the vocabulary that the evaluation gives it for a padding tokenizer."""
    if padder is tokenizer:
        return contextlib.nullcontext
    # ids may have gaps; the reference would then look for a row that it has cut off
    return Resized(model, max(len(padder), padder.pad_token_id + 1)).active


@contextlib.contextmanager
def positions(model: Any) -> Iterator[None]:
    """Count positions in `generate` as transformers 4.53 does, whatever release is installed.

    Padding stands at position 1, and tokens are counted without it; later releases count on from the last token, be
    it padding or not.
    """
    base = inner(model)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        yield
        return

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2 and ids is not None:
            places = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
            kwargs["position_ids"] = places[:, -ids.shape[1] :]
        return args, kwargs

    hook = base.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def under(context: Context, batches: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield batches that are computed in a context, which does not hold while the caller has one."""
    while True:
        with context():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
