"""From a conversation to token ids and the spans of them that are labels."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.config import Config
from fedtune.data.check import TrainRow
from fedtune.data.conversation import Turn
from fedtune.types import ModelError

_PLACE = re.compile(r"\{(instruction|response)\}")


@dataclass(frozen=True)
class Text:
    """Token ids, and the spans [start, end) of them that are labels: in order, and apart from each other."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @staticmethod
    def labelled(ids: Sequence[int], start: int) -> Text:
        """Return a text whose labels are all tokens from `start` on."""
        return Text(tuple(ids), ((start, len(ids)),))

    @property
    def start(self) -> int:
        """Index of the first label; before it stands the prompt."""
        return self.spans[0][0] if self.spans else len(self.ids)

    @property
    def labels(self) -> int:
        """How many tokens are trained on."""
        return sum(end - start for start, end in self.spans)

    def cut(self, length: int) -> Text:
        """Return the first `length` tokens; a label at position 0 has nothing to be predicted from and is none."""
        ids = self.ids[:length]
        spans = ((max(start, 1), min(end, len(ids))) for start, end in self.spans)
        return Text(ids, tuple((start, end) for start, end in spans if start < end))


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


def encode_pair(tokenizer: Any, prompt: str, response: str, *, special: bool = True) -> Text:
    """Encode prompt and response as one text; a token is a label if it reaches into the response.

    Works with any tokenizer: nothing is assumed about where a token may begin. A space between prompt and
    response belongs to the response's first token in byte-level vocabularies, and does so here.

    Args:
        special: let the tokenizer add the special tokens it adds to a text; False where the prompt has them.

    Raises:
        ModelError: a tokenizer without offsets that does not tell where the response begins either.
    """
    if not getattr(tokenizer, "is_fast", False):
        return _without_offsets(tokenizer, prompt, response, special)
    encoded = tokenizer(prompt + response, return_offsets_mapping=True, add_special_tokens=special)
    ends = [end for _, end in encoded["offset_mapping"]]
    start = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
    return Text.labelled(encoded["input_ids"], start)


def _without_offsets(tokenizer: Any, prompt: str, response: str, special: bool) -> Text:
    """Encode as `encode_pair` does, with a tokenizer that does not say which letters a token stands for.

    Where the prompt alone has the same first tokens, the response begins after them. Elsewhere a token stands on both
    sides of the border, and is found by what the tokens up to it are decoded to.
    """
    whole = list(tokenizer(prompt + response, add_special_tokens=special)["input_ids"])
    alone = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    same = next((i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone)))
    if set(alone[same:]) <= set(tokenizer.all_special_ids):
        return Text.labelled(whole, same)

    def text(tokens: int) -> str:
        return str(tokenizer.decode(whole[:tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead, found, _ = text(len(whole)).partition(prompt + response)
    if not found:
        raise ModelError(
            f"the tokenizer ({type(tokenizer).__name__}) gives neither offsets nor its text back, so where an answer "
            "begins cannot be known; use a fast tokenizer (one with tokenizer.json)"
        )
    covered = bisect.bisect_left(range(len(whole)), True, key=lambda n: text(n).startswith(lead + prompt))
    return Text.labelled(whole, covered if text(covered) == lead + prompt else covered - 1)


class Encoder:
    """How the conversations of a run become tokens.

    Args:
        config: the template, what counts as a label, and whether an answer ends with the end of text.
    """

    def __init__(self, tokenizer: Any, config: Config) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._special = special_tokens(tokenizer)

    def turns(self, row: TrainRow) -> tuple[Turn, ...]:
        """Return the questions and answers of a row: its conversation, or the one that its columns are."""
        columns = {"instruction": row.instruction, "input": row.input}
        asked = columns.get(self.config.prompt.input, f"{row.instruction} {row.input}")
        return row.turns or ((asked, row.output),)

    def text(self, turns: Sequence[Turn]) -> Text:
        """Encode a conversation; its labels are the answers.

        Each turn is the template filled with its question, and then its answer. So the first turn is what a single
        question is, which a model is asked at evaluation.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, (asked, answer) in enumerate(turns):
            text = self._turn(asked, answer, first=not number)
            spans += [(start + len(ids), end + len(ids)) for start, end in text.spans]
            ids += text.ids
        return Text(tuple(ids), tuple(spans))

    def _turn(self, asked: str, answer: str, *, first: bool) -> Text:
        tokenizer, train = self.tokenizer, self.config.train
        # where no end of text tells an answer from the next turn, a line does
        border = "" if first or train.train_eos else "\n"
        text = border + render(self.config.prompt.template, escape_special(asked, self._special))
        encoded = encode_pair(tokenizer, text, escape_special(answer, self._special), special=first)
        if train.labels == "template-tokens":
            # trl's completion-only collator as FlowerTune's template calls it: the response is what follows the
            # last place where the marker's tokens, without the first two, stand. See docs/protocol.md.
            marker = tokenizer("\n### Response:", add_special_tokens=False)["input_ids"][2:]
            found = _find_last(encoded.ids, marker)
            return Text.labelled(encoded.ids, found if found >= 0 else len(encoded.ids))
        # some tokenizers end every text themselves
        if train.train_eos and tokenizer.eos_token_id is not None and encoded.ids[-1:] != (tokenizer.eos_token_id,):
            return Text.labelled((*encoded.ids, tokenizer.eos_token_id), encoded.start)
        return encoded
