"""Encoded rows kept by hash, so that the same rows under the same template and tokenizer are encoded once."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config import Config
from fedtune.data.check import TrainRow
from fedtune.data.encode import Encoded, EncodedSet, encode, special_tokens
from fedtune.io import cache_dir, digest, write_bytes

log = logging.getLogger("fedtune")

VERSION = 3


def _key(rows: Sequence[TrainRow], tokenizer: Any, config: Config) -> str | None:
    """Return the hash of all that decides the tokens; None where a tokenizer cannot be identified."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    train = config.train
    return digest(
        [
            VERSION,
            [asdict(row) for row in rows],
            backend.to_str(),
            special_tokens(tokenizer),
            config.prompt.model_dump(mode="json"),
            [train.max_length, train.labels, train.train_eos],
        ]
    )


def _packed(found: EncodedSet) -> bytes:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.array([i for e in found.examples for i in e.ids], np.int32),
        lengths=np.array([len(e.ids) for e in found.examples], np.int32),
        starts=np.array([e.start for e in found.examples], np.int32),
        kept=np.array(found.kept, np.int32),
        masked=np.array(found.masked, np.int32),
        truncated=np.array(found.truncated, np.int32),
    )
    return buffer.getvalue()


def _unpacked(path: Path) -> EncodedSet:
    with np.load(path, allow_pickle=False) as arrays:
        table = {name: arrays[name].tolist() for name in arrays.files}
    examples, place = [], 0
    for length, start in zip(table["lengths"], table["starts"], strict=True):
        examples.append(Encoded(tuple(table["ids"][place : place + length]), start))
        place += length
    if place != len(table["ids"]):
        raise ValueError("lengths do not add up")
    return EncodedSet(tuple(examples), tuple(table["kept"]), tuple(table["masked"]), tuple(table["truncated"]))


def encode_once(rows: Sequence[TrainRow], tokenizer: Any, config: Config) -> EncodedSet:
    """Return `encode(rows, …)`, from the cache where it is there and whole."""
    key = _key(rows, tokenizer, config)
    path = cache_dir() / "tokens" / f"{key}.npz"
    if key is not None and path.exists():
        try:
            return _unpacked(path)
        except Exception:  # damaged in whatever way: made again
            log.info("%s is damaged and made again", path)
    found = encode(rows, tokenizer, config)
    if key is not None:
        try:
            write_bytes(path, _packed(found))
        except OSError as err:
            log.warning("the tokens are not kept for another run: %s: %s", path, err.strerror or err)
    return found
