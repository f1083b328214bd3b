"""Generate as FlowerTune's evaluation does, its quirks included, with as few forward passes as that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtune.domains.base import Item, Kind
from fedtune.evaluation.extract import ANSWER_MARK
from fedtune.models.attention import packed_logits

CHOICE_BATCH = 16
SENTIMENT_BATCH = 32
SENTIMENT_LENGTH = 512
SEED = 2024


def wrap(prompt: str, kind: str) -> str:
    """Wrap a prompt as the official evaluation does: ChatML-like for questions, nothing for sentiment."""
    if kind == "sentiment":
        return prompt
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


def batch_size(kind: Kind) -> int:
    """Return how many items the official evaluation takes at a time; it decides more than speed."""
    return SENTIMENT_BATCH if kind == "sentiment" else CHOICE_BATCH


def _repetition_penalty(model: Any) -> float:
    return float(getattr(model.generation_config, "repetition_penalty", None) or 1.0)


def _first_tokens(model: Any, texts: Sequence[Sequence[int]]) -> list[int]:
    """Return the greedy next token of each text, from one packed pass.

    `generate` applies the model's own repetition penalty even when it is told not to sample, so it is here.
    """
    ends, total = [], 0
    for text in texts:
        total += len(text)
        ends.append(total - 1)
    logits = packed_logits(model, texts, ends, share_prefix=True).float()
    penalty = _repetition_penalty(model)
    if penalty != 1.0:
        from transformers import RepetitionPenaltyLogitsProcessor

        processor = RepetitionPenaltyLogitsProcessor(penalty)
        rows = [
            processor(torch.tensor([list(text)], device=logits.device), logits[i : i + 1])
            for i, text in enumerate(texts)
        ]
        logits = torch.cat(rows)
    return [int(token) for token in logits.argmax(-1)]


def _generate_one(model: Any, tokenizer: Any, text: Sequence[int], new_tokens: int) -> str:
    ids = torch.tensor([list(text)], device=model.device)
    made = model.generate(
        inputs=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(made[0][len(text) :], skip_special_tokens=True))


@torch.inference_mode()
def choose(model: Any, tokenizer: Any, items: Sequence[Item], kind: Kind) -> Iterator[list[str]]:
    """Yield the outputs of one official batch of questions after the other.

    The number of new tokens is the token length of the first gold answer of the batch: for a letter it is
    one, and the greedy token is the arg-max of the last logits, so no generation loop is needed.
    """
    for start in range(0, len(items), CHOICE_BATCH):
        batch = items[start : start + CHOICE_BATCH]
        texts = [tokenizer(wrap(item.prompt, kind))["input_ids"] for item in batch]
        new_tokens = len(tokenizer(batch[0].gold_answer, add_special_tokens=False)["input_ids"])
        if new_tokens == 1:
            yield [tokenizer.decode([t], skip_special_tokens=True) for t in _first_tokens(model, texts)]
        else:
            yield [_generate_one(model, tokenizer, text, new_tokens) for text in texts]


def verdict_fixed(text: str) -> bool:
    """Tell whether more text could still change the official sentiment label.

    Text is what was decoded so far, the prompt included; the label is read between the first and the second
    `Answer: `, and "positive" wins wherever it stands there.
    """
    parts = text.split(ANSWER_MARK)
    return len(parts) > 2 or (len(parts) == 2 and ("positive" in parts[1] or "Positive" in parts[1]))


def _stopper(tokenizer: Any) -> Any:
    from transformers import StoppingCriteria

    class VerdictFixed(StoppingCriteria):  # type: ignore[misc]  # untyped base
        """Ends a row once its label cannot change."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            return torch.tensor([verdict_fixed(t) for t in texts], device=input_ids.device)

    return VerdictFixed()


def _sentiment_batch(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[str]:
    tokens = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    limit = {"max_new_tokens": new_tokens} if new_tokens else {"max_length": SENTIMENT_LENGTH}
    sampled = bool(model.generation_config.do_sample)
    # a sampled batch must run to its end: stopping early would shift the random stream of the next one
    stop = {} if sampled else {"stopping_criteria": [_stopper(tokenizer)]}
    made = model.generate(**tokens, **limit, **stop, eos_token_id=tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [text.split(ANSWER_MARK)[1] for text in texts]


@torch.inference_mode()
def sentiment(model: Any, tokenizer: Any, items: Sequence[Item], new_tokens: int = 0) -> Iterator[list[str]]:
    """Yield the outputs of one official batch of sentiment prompts after the other.

    Batches are padded on the tokenizer's own default side and the model's own generation settings apply, as
    in the official evaluation; a row's decoding ends when its label is fixed, which cannot change a score.

    Args:
        model, tokenizer, items: what to ask whom.
        new_tokens: cap for a packaged set; 0 decodes to the official total of 512 tokens.
    """
    for start in range(0, len(items), SENTIMENT_BATCH):
        prompts = [item.prompt for item in items[start : start + SENTIMENT_BATCH]]
        torch.manual_seed(SEED + start)
        yield _sentiment_batch(model, tokenizer, prompts, new_tokens)
