"""Generate as FlowerTune's evaluation does, its quirks included, with as few forward passes as that takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtune.domains.base import Item
from fedtune.evaluation import alone, pinned
from fedtune.evaluation.decode import Row, check_scores, likeliest, windowed
from fedtune.evaluation.extract import ANSWER_MARK, wrap
from fedtune.models import sides
from fedtune.models.attention import packed_logits, row_weights

CHOICE_BATCH = 16
SENTIMENT_BATCH = 32
SENTIMENT_LENGTH = 512
GROUP = 8
SEED = 2024
# what a label hangs on, less what may come with the next token; and more tokens than either has, with a margin
WORDS, TAIL = (ANSWER_MARK.rstrip(), "ositive"), 24
# generation settings that do not change which token is the likeliest
HARMLESS = {
    "_from_model_config",
    "bos_token_id",
    "eos_token_id",
    "max_length",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}
# more of them for a single token that is asked for without sampling; the penalty is applied
HARMLESS_ONCE = HARMLESS | {"cache_implementation", "do_sample", "max_new_tokens", "repetition_penalty"}


def _first_tokens(model: Any, texts: Sequence[Sequence[int]]) -> list[int]:
    """Return the greedy next token of each text, from one packed pass.

    `generate` applies the model's own repetition penalty even when it is told not to sample, so it is here.
    """
    ends = [end - 1 for end in itertools.accumulate(map(len, texts))]
    logits = packed_logits(model, texts, ends, share_prefix=True).float()
    penalty = float(getattr(model.generation_config, "repetition_penalty", None) or 1.0)
    if penalty != 1.0:
        from transformers import RepetitionPenaltyLogitsProcessor

        processor = RepetitionPenaltyLogitsProcessor(penalty)
        rows = [
            processor(torch.tensor([list(text)], device=logits.device), logits[i : i + 1])
            for i, text in enumerate(texts)
        ]
        logits = torch.cat(rows)
    return list(likeliest(logits))


def _copies(model: Any) -> int:
    """Return how many rows `generate` makes of each text."""
    settings = model.generation_config
    return max(int(settings.num_beams or 1), int(settings.num_return_sequences or 1))


def _generate_one(model: Any, tokenizer: Any, text: Sequence[int], new_tokens: int) -> str:
    ids = torch.tensor([list(text)], device=model.device)
    with row_weights(model, [text], _copies(model)):
        made = model.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=[check_scores],
            return_dict_in_generate=False,
        )
    return _text(tokenizer, made[0][len(text) :])


@torch.inference_mode()
def choose(model: Any, tokenizer: Any, items: Sequence[Item]) -> Iterator[list[str]]:
    """Yield the outputs of one official batch of questions after the other.

    The number of new tokens is the token length of the first gold answer of the batch: for a letter it is
    one, and the greedy token is the arg-max of the last logits, so no generation loop is needed; unless the model
    has generation settings that choose otherwise.
    """
    plain = not set(model.generation_config.to_diff_dict()) - HARMLESS_ONCE
    for start in range(0, len(items), CHOICE_BATCH):
        batch = items[start : start + CHOICE_BATCH]
        texts = [tokenizer(wrap(item.prompt))["input_ids"] for item in batch]
        new_tokens = len(tokenizer(batch[0].gold_answer, add_special_tokens=False)["input_ids"])
        if new_tokens == 1 and plain:
            yield [_text(tokenizer, [token]) for token in _first_tokens(model, texts)]
        else:
            yield [_generate_one(model, tokenizer, text, new_tokens) for text in texts]


def verdict_fixed(text: str) -> bool:
    """Tell whether more text could still change the official sentiment label.

    Text is what was decoded so far, the prompt included; the label is read between the first and the second
    `Answer: `, and "positive" wins wherever it stands there.
    """
    parts = text.split(ANSWER_MARK)
    return len(parts) > 2 or (len(parts) == 2 and ("positive" in parts[1] or "Positive" in parts[1]))


def _label_fixed(tokenizer: Any) -> Callable[[Sequence[int], Sequence[int]], bool]:
    """Return what tells, after each new token of a prompt, whether its label is fixed, mostly from the text's end.

    What fixes a label is a word, and its last token is there then: as many tokens are decoded as it may have, special
    ones not counted. The whole text is decoded at its first new token, and where such a word ends it.
    """
    special = set(tokenizer.all_special_ids)

    def fixed(prompt: Sequence[int], new: Sequence[int]) -> bool:
        words = (t for t in itertools.chain(reversed(new), reversed(prompt)) if t not in special)
        tail = _text(tokenizer, [*itertools.islice(words, TAIL)][::-1])
        near = len(new) <= 1 or any(word in tail for word in WORDS)
        return near and verdict_fixed(_text(tokenizer, [*prompt, *new]))

    return fixed


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _plain_greedy(model: Any) -> bool:
    """Tell whether `generate` would take the likeliest token each time, whatever else the model's settings are."""
    settings = model.generation_config.to_diff_dict()
    return not model.generation_config.do_sample and not set(settings) - HARMLESS


def _generated(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[str]:
    """Decode a batch by `generate`: for models with sampling or penalties of their own."""
    tokens = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    limit = {"max_new_tokens": new_tokens} if new_tokens else {"max_length": SENTIMENT_LENGTH}
    fixed, width = _label_fixed(tokenizer), tokens["input_ids"].shape[1]

    def stopped(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor([fixed(row[:width], row[width:]) for row in ids.tolist()], device=ids.device)

    # a sampled batch must run to its end: stopping early would shift the random stream of the next one
    stop = {} if model.generation_config.do_sample else {"stopping_criteria": [stopped]}
    rows = zip(tokens["input_ids"].tolist(), tokens["attention_mask"].tolist(), strict=True)
    texts = [[token for token, seen in zip(*row, strict=True) if seen] for row in rows]
    with row_weights(model, texts, _copies(model)), pinned.positions(model):
        made = model.generate(
            **tokens,
            **limit,
            **stop,
            eos_token_id=tokenizer.eos_token_id,
            logits_processor=[check_scores],
            return_dict_in_generate=False,
        )
    return [text.split(ANSWER_MARK)[1] for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def _padded_rows(tokenizer: Any, prompts: Sequence[str], start: int) -> tuple[list[Row], int]:
    """Return an official batch's rows without the padding that nothing depends on, and the width it was padded to.

    A token of padding at the right end decides the first new token, so one is kept; the others are never seen. It has
    position 1, and what follows goes on counting the prompt's tokens: so `generate` did in transformers 4.53, which
    FlowerTune's template pins; later releases count from the padding on.
    """
    tokens = tokenizer(prompts, padding=True, return_token_type_ids=False)
    rows = []
    for i, (ids, seen) in enumerate(zip(tokens["input_ids"], tokens["attention_mask"], strict=True), start):
        blind = seen[-1] == 0
        own = [token for token, one in zip(ids, seen, strict=True) if one]
        rows.append(Row(i, [*own, ids[-1]] if blind else own, blind=blind))
    return rows, len(tokens["input_ids"][0])


def _decoded(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> Iterator[list[str]]:
    """Decode greedily: official batches side by side, a row no further than to where its label is fixed."""
    room: dict[int, int] = {}
    official: list[list[Row]] = []
    for start in range(0, len(prompts), SENTIMENT_BATCH):
        rows, width = _padded_rows(tokenizer, list(prompts[start : start + SENTIMENT_BATCH]), start)
        if not new_tokens and width >= SENTIMENT_LENGTH:
            raise ValueError(f"the longest prompt has {width} tokens: nothing can follow, {SENTIMENT_LENGTH} are all")
        room |= {row.index: new_tokens or SENTIMENT_LENGTH - width for row in rows}
        official.append(rows)

    fixed = _label_fixed(tokenizer)

    def done(row: Row) -> bool:
        full = len(row.new) >= room[row.index] or row.new[-1] == tokenizer.eos_token_id
        return full or fixed(row.prompt, row.new)

    longest = max(len(row.prompt) + room[row.index] for rows in official for row in rows)
    # rows of about one length are started together, with little padding
    ordered = [sorted(rows, key=lambda row: len(row.prompt)) for rows in official]
    given, groups = 0, [rows[i : i + GROUP] for rows in ordered for i in range(0, len(rows), GROUP)]
    for _ in alone.decode(model, groups, 2 * SENTIMENT_BATCH, longest, done):
        while given < len(official) and all(row.ended for row in official[given]):
            texts = (_text(tokenizer, [*row.prompt, *row.new]) for row in official[given])
            yield [text.split(ANSWER_MARK)[1] for text in texts]
            given += 1


def _decodable(model: Any, tokenizer: Any) -> bool:
    """Tell whether our own decoding gives what `generate` would; that a running batch does is tried on the model.

    It leaves padding out, which a layer that sees the last columns of a batch counts when it is on the right.
    """
    mixer = sides.of(model)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    counted = windowed(model) and window < 2 * SENTIMENT_LENGTH and tokenizer.padding_side == "right"
    proven = alone.batches(model, 2 * SENTIMENT_LENGTH)
    return _plain_greedy(model) and proven and not counted and not (mixer is not None and mixer.per_text)


def _sentiment(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int, first: int) -> Iterator[list[str]]:
    if _decodable(model, tokenizer):
        yield from _decoded(model, tokenizer, prompts, new_tokens)
        return
    for start in range(0, len(prompts), SENTIMENT_BATCH):
        torch.manual_seed(SEED + first + start)
        yield _generated(model, tokenizer, prompts[start : start + SENTIMENT_BATCH], new_tokens)


@torch.inference_mode()
def sentiment(
    model: Any, tokenizer: Any, items: Sequence[Item], new_tokens: int = 0, first: int = 0
) -> Iterator[list[str]]:
    """Yield the outputs of one official batch of sentiment prompts after the other.

    Batches are padded on the tokenizer's own default side, with `[PAD]` where it has no padding token but EOS, and the
    model's own generation settings apply, as in the official evaluation; a row's decoding ends when its label is fixed,
    which cannot change a score.

    Args:
        new_tokens: cap for a packaged set; 0 decodes to the official total of 512 tokens.
        first: the place of the first item in its task, which a sampled batch's random stream is keyed by: the rest of
            an evaluation that was cut off samples what it would have.
    """
    padder = pinned.padding_tokenizer(tokenizer)
    batches = _sentiment(model, padder, [item.prompt for item in items], new_tokens, first)
    yield from pinned.under(pinned.vocabulary(model, tokenizer, padder), batches)
