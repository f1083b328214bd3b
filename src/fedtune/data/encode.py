"""From a row to token ids and the place where its labels begin."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.config import Config
from fedtune.data.check import TrainRow
from fedtune.types import ModelError

_PLACE = re.compile(r"\{(instruction|response)\}")


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, and the index of the first one that is a label; all after it are labels too."""

    ids: tuple[int, ...]
    start: int

    @property
    def labels(self) -> int:
        """How many tokens are trained on."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class EncodedSet:
    """Encoded examples, with the rows that had to be left out or cut.

    Attributes:
        examples: those that train; none is without a label.
        kept: for each, the index of its row in what was encoded.
        masked: rows with no label left (the answer lay behind the cut, or was not found): never trained.
        truncated: rows cut at the maximum length that still have labels.
    """

    examples: tuple[Encoded, ...]
    kept: tuple[int, ...]
    masked: tuple[int, ...]
    truncated: tuple[int, ...]


def question(row: TrainRow, mode: str) -> str:
    """Return the text that stands at `{instruction}`: instruction, input, or both joined by a space."""
    if mode == "instruction":
        return row.instruction
    if mode == "input":
        return row.input
    return f"{row.instruction} {row.input}"


def render(template: str, instruction: str) -> str:
    """Fill the template up to the response, in one pass: braces in the data stay what they are."""
    fields = {"instruction": instruction, "response": ""}
    return _PLACE.sub(lambda m: fields[m[1]], template)


def special_tokens(tokenizer: Any) -> list[str]:
    """Return all texts that a tokenizer takes for special tokens, the longest first.

    `all_special_tokens` has only those with a role of their own, such as the end of a text; the tokens of a chat's
    turns are often just marked as special.
    """
    marked = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {*tokenizer.all_special_tokens, *(str(token) for token in marked if token.special)}
    return sorted(found, key=lambda token: (-len(token), token))


def escape_special(text: str, special: Sequence[str]) -> str:
    """Break up a tokenizer's `special_tokens` inside data, so that text cannot pose as a chat turn.

    `<|im_end|>` becomes `< |im_end|>`: it reads the same and encodes as ordinary text.
    """
    for token in special:
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _find_last(ids: Sequence[int], wanted: Sequence[int]) -> int:
    """Return the index after the last occurrence of `wanted` in `ids`, or -1."""
    for i in range(len(ids) - len(wanted), -1, -1):
        if list(ids[i : i + len(wanted)]) == list(wanted):
            return i + len(wanted)
    return -1


def encode_pair(tokenizer: Any, prompt: str, response: str, *, special: bool = True) -> Encoded:
    """Encode prompt and response as one text; a token is a label if it reaches into the response.

    Works with any tokenizer: nothing is assumed about where a token may begin. A space between prompt and
    response belongs to the response's first token in byte-level vocabularies, and does so here.

    Args:
        tokenizer: whose tokens.
        prompt, response: the text.
        special: let the tokenizer add the special tokens it adds to a text; False where the prompt has them.

    Raises:
        ModelError: a tokenizer without offsets that does not tell where the response begins either.
    """
    if not getattr(tokenizer, "is_fast", False):
        return _without_offsets(tokenizer, prompt, response, special)
    encoded = tokenizer(prompt + response, return_offsets_mapping=True, add_special_tokens=special)
    ends = [end for _, end in encoded["offset_mapping"]]
    start = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
    return Encoded(tuple(encoded["input_ids"]), start)


def _without_offsets(tokenizer: Any, prompt: str, response: str, special: bool) -> Encoded:
    """Encode as `encode_pair` does, with a tokenizer that does not say which letters a token stands for.

    Where the prompt alone has the same first tokens, the response begins after them. Elsewhere a token stands on both
    sides of the border, and is found by what the tokens up to it are decoded to.
    """
    whole = list(tokenizer(prompt + response, add_special_tokens=special)["input_ids"])
    alone = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    same = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone)))
    if set(alone[same:]) <= set(tokenizer.all_special_ids):
        return Encoded(tuple(whole), same)

    def text(tokens: int) -> str:
        return str(tokenizer.decode(whole[:tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead, found, _ = text(len(whole)).partition(prompt + response)
    if not found:
        raise ModelError(
            f"the tokenizer ({type(tokenizer).__name__}) gives neither offsets nor its text back, so where an answer "
            "begins cannot be known; use a fast tokenizer (one with tokenizer.json)"
        )
    covered = bisect.bisect_left(range(len(whole)), True, key=lambda n: text(n).startswith(lead + prompt))
    return Encoded(tuple(whole), covered if text(covered) == lead + prompt else covered - 1)


def _encode_row(row: TrainRow, tokenizer: Any, special: Sequence[str], config: Config) -> Encoded:
    train, prompt = config.train, config.prompt
    text = render(prompt.template, escape_special(question(row, prompt.input), special))
    encoded = encode_pair(tokenizer, text, escape_special(row.output, special))
    if train.labels == "template-tokens":
        # trl's completion-only collator as FlowerTune's template calls it: the response is what follows the
        # last place where the marker's tokens, without the first two, stand. See docs/protocol.md.
        marker = tokenizer("\n### Response:", add_special_tokens=False)["input_ids"][2:]
        found = _find_last(encoded.ids, marker)
        return Encoded(encoded.ids, found if found >= 0 else len(encoded.ids))
    # some tokenizers end every text themselves
    if train.train_eos and tokenizer.eos_token_id is not None and encoded.ids[-1:] != (tokenizer.eos_token_id,):
        return Encoded((*encoded.ids, tokenizer.eos_token_id), encoded.start)
    return encoded


def encode(rows: Sequence[TrainRow], tokenizer: Any, config: Config) -> EncodedSet:
    """Encode rows, cut them at `train.max_length`, and set aside those without a label.

    A label at position 0 has nothing to be predicted from and does not count.
    """
    examples: list[Encoded] = []
    kept: list[int] = []
    masked: list[int] = []
    truncated: list[int] = []
    special = special_tokens(tokenizer)
    for index, row in enumerate(rows):
        whole = _encode_row(row, tokenizer, special, config)
        cut = Encoded(whole.ids[: config.train.max_length], max(whole.start, 1))
        if cut.labels <= 0:
            masked.append(index)
            continue
        if len(cut.ids) < len(whole.ids):
            truncated.append(index)
        examples.append(cut)
        kept.append(index)
    return EncodedSet(tuple(examples), tuple(kept), tuple(masked), tuple(truncated))
