"""Rows as examples; what plain conversations make is kept by hash, so that the same rows are encoded once."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config import Config
from fedtune.data.check import TrainRow
from fedtune.data.encode import Encoder, Text, special_tokens
from fedtune.io import digest, write_bytes
from fedtune.machine import cache_dir
from fedtune.objectives.base import Example, Objective

log = logging.getLogger("fedtune")

VERSION = 4


@dataclass(frozen=True)
class EncodedSet:
    """Examples, with the rows that had to be left out or cut.

    Attributes:
        examples: those that train; each text has a label.
        kept: for each, the index of its row in what was encoded.
        masked: rows with a text that has no label left (its answer lay behind the cut, or was not found).
        truncated: rows with a text that was cut at the maximum length and still has labels.
    """

    examples: tuple[Example, ...]
    kept: tuple[int, ...]
    masked: tuple[int, ...]
    truncated: tuple[int, ...]


def encode(rows: Sequence[TrainRow], objective: Objective[Any], tokenizer: Any, config: Config) -> EncodedSet:
    """Encode rows, cut each text at `train.max_length`, and set aside rows with a text without a label."""
    encoder, examples = Encoder(tokenizer, config), list[Example]()
    kept, masked, truncated = list[int](), list[int](), list[int]()
    for index, row in enumerate(rows):
        whole = objective.encode(row, encoder)
        cut = replace(whole, texts=tuple(text.cut(config.train.max_length) for text in whole.texts))
        if not all(text.labels for text in cut.texts):
            masked.append(index)
            continue
        if cut.tokens < whole.tokens:
            truncated.append(index)
        examples.append(cut)
        kept.append(index)
    return EncodedSet(tuple(examples), tuple(kept), tuple(masked), tuple(truncated))


def _key(rows: Sequence[TrainRow], objective: Objective[Any], tokenizer: Any, config: Config) -> str | None:
    """Return the hash of all that decides the tokens; None where it cannot be told.

    That is so for tokenizers without a description, and for objectives that encode rows by code of their own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(objective).encode is not Objective.encode:
        return None
    train = config.train
    return digest(
        [
            VERSION,
            [row.plain() for row in rows],
            backend.to_str(),
            special_tokens(tokenizer),
            config.prompt.model_dump(mode="json"),
            [train.max_length, train.labels, train.train_eos],
        ]
    )


def _packed(found: EncodedSet) -> bytes:
    buffer, texts = io.BytesIO(), [text for example in found.examples for text in example.texts]
    np.savez(
        buffer,
        ids=np.array([i for text in texts for i in text.ids], np.int32),
        lengths=np.array([len(text.ids) for text in texts], np.int32),
        spans=np.array([span for text in texts for span in text.spans], np.int32).reshape(-1, 2),
        turns=np.array([len(text.spans) for text in texts], np.int32),
        kept=np.array(found.kept, np.int32),
        masked=np.array(found.masked, np.int32),
        truncated=np.array(found.truncated, np.int32),
    )
    return buffer.getvalue()


def _unpacked(path: Path) -> EncodedSet:
    with np.load(path, allow_pickle=False) as arrays:
        table = {name: arrays[name].tolist() for name in arrays.files}
    if (sum(table["lengths"]), sum(table["turns"])) != (len(table["ids"]), len(table["spans"])):
        raise ValueError("lengths do not add up")
    ids, spans, examples = iter(table["ids"]), map(tuple, table["spans"]), []
    for length, turns in zip(table["lengths"], table["turns"], strict=True):
        examples.append(Example((Text(tuple(islice(ids, length)), tuple(islice(spans, turns))),)))
    return EncodedSet(tuple(examples), tuple(table["kept"]), tuple(table["masked"]), tuple(table["truncated"]))


def encode_once(rows: Sequence[TrainRow], objective: Objective[Any], tokenizer: Any, config: Config) -> EncodedSet:
    """Return `encode(rows, …)`, from the cache where it is there and whole."""
    key = _key(rows, objective, tokenizer, config)
    path = cache_dir() / "tokens" / f"{key}.npz"
    if key is not None and path.exists():
        try:
            return _unpacked(path)
        except Exception:  # damaged in whatever way: made again
            log.info("%s is damaged and made again", path)
    found = encode(rows, objective, tokenizer, config)
    if key is not None:
        try:
            write_bytes(path, _packed(found))
        except OSError as err:
            log.warning("the tokens are not kept for another run: %s: %s", path, err.strerror or err)
    return found
