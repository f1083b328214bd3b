"""The training data of a run: rows, checked, split over clients, encoded, and identified by a hash."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedtune import domains, objectives
from fedtune.config import Config
from fedtune.data import check, files, hub, partition
from fedtune.data.encode import Text
from fedtune.domains.base import Row, TrainingSet
from fedtune.io import digest
from fedtune.machine import expanded
from fedtune.objectives import Example
from fedtune.objectives.examples import encode_once
from fedtune.types import DataError, derive_seed


@dataclass(frozen=True)
class TrainingData:
    """Checked rows and their split.

    Attributes:
        name: the set's own honest name.
        checked: the rows that may train, and the report on the rest.
        shards: for each client, indices into `checked.rows`.
        hash: of the rows and their split; a run is only resumed on the same.
    """

    name: str
    checked: check.CheckedRows
    shards: tuple[tuple[int, ...], ...]
    hash: str

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of the data."""
        return {
            "name": self.name,
            "rows": len(self.checked.rows),
            "sha256": self.hash,
            "clients": [len(s) for s in self.shards],
            "bad_rows": self.checked.counts(),
        }


def _folder_rows(config: Config) -> tuple[str, list[Row]]:
    folder = expanded(config.data.path) / "train"
    paths = files.find(f"{config.domain}_*", folder) or files.find(config.domain, folder)
    if not paths:
        wanted = f"no {config.domain}_*.jsonl(.gz), .json, .csv or .parquet file to train on"
        raise DataError(f"{folder}: {wanted}; {files.listed(folder)}")
    return "+".join(p.name.split(".")[0] for p in paths), [row for p in paths for row in files.read_rows(p)]


def source(config: Config) -> tuple[TrainingSet, list[Row]]:
    """Return the training set a run asks for, with all its rows.

    Raises:
        DataError, OfflineError, CorruptFileError: it cannot be had; the message says what to do.
    """
    domain = domains.DOMAINS[config.domain]
    if config.data.source == "folder":
        name, rows = _folder_rows(config)
        return TrainingSet(name, group=domain.group), rows
    if found := domains.training_set(config):
        return domain.training, list(hub.load(found))
    if domain.packaged.packaged is None:
        raise DataError(f"{domain.name} has no packaged training set")
    return domain.packaged, list(domain.packaged.packaged())


def _chosen(rows: Sequence[check.TrainRow], config: Config) -> list[check.TrainRow]:
    """Cut a set down to `data.limit` rows, drawn by seed; balanced over the partition column if asked."""
    if not config.data.limit or config.data.limit >= len(rows):
        return list(rows)
    order = list(range(len(rows)))
    random.Random(derive_seed(config.data.shuffle_seed, "limit")).shuffle(order)
    if config.data.balance:
        rank: dict[str, int] = {}
        keyed: list[tuple[int, int, int]] = []
        for i in order:
            rank[rows[i].group] = rank.get(rows[i].group, 0) + 1
            keyed.append((rank[rows[i].group], len(keyed), i))
        order = [i for _, _, i in sorted(keyed)]
    return [rows[i] for i in sorted(order[: config.data.limit])]


def load(config: Config) -> TrainingData:
    """Read, check and split a run's training rows.

    Raises:
        DataError: nothing to train on, or the split is impossible.
    """
    training, raw = source(config)
    wanted = objectives.kind(config).columns
    checked = check.check(raw, training.columns, training.group, config.data.max_chars, wanted)
    rows = _chosen(check.require(checked, training.name), config)
    shards = partition.partition(rows, config.data.partition, config.federation.clients, config.data.shuffle_seed)
    data_hash = digest([[row.plain() for row in rows], shards])
    return TrainingData(
        training.name, check.CheckedRows(tuple(rows), checked.problems), tuple(map(tuple, shards)), data_hash
    )


@dataclass(frozen=True)
class EncodedShards:
    """Each client's examples, and how many rows were cut or have no label and never train."""

    shards: tuple[tuple[Example, ...], ...]
    masked: tuple[int, ...]
    truncated: int

    def of(self, client: int) -> EncodedShards:
        """Return the same without any other client's examples."""
        return replace(self, shards=tuple(own if c == client else () for c, own in enumerate(self.shards)))

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(example.tokens for shard in self.shards for example in shard)

    @property
    def mean(self) -> float:
        """Tokens of an example on average."""
        lengths = [example.tokens for shard in self.shards for example in shard]
        return sum(lengths) / len(lengths)

    @property
    def sizes(self) -> dict[int, int]:
        """Examples of each client."""
        return {client: len(shard) for client, shard in enumerate(self.shards)}


def encode_shards(data: TrainingData, tokenizer: Any, config: Config) -> EncodedShards:
    """Encode every row once and hand each client its own.

    Raises:
        DataError: no row of any client has a label (wrong template, or all answers lie behind the cut).
    """
    encoded = encode_once(data.checked.rows, objectives.build(config), tokenizer, config)
    if not encoded.examples:
        raise DataError(
            f"{data.name}: none of {len(data.checked.rows)} rows has a label left; is the response marker in "
            f"prompt.template, and max_length = {config.train.max_length} long enough?"
        )
    by_row = dict(zip(encoded.kept, encoded.examples, strict=True))
    shards = tuple(tuple(by_row[i] for i in shard if i in by_row) for shard in data.shards)
    return EncodedShards(shards, encoded.masked, len(encoded.truncated))


def poisoned(shards: EncodedShards, config: Config) -> EncodedShards:
    """Return the shards with the responses of label-flipping attackers exchanged among their own examples.

    Each example gets the next example's response that differs from its own; every other client's are untouched.
    """
    if config.attack.kind != "label-flip":
        return shards
    changed = [
        _flipped(shard) if client in config.attack.clients else shard for client, shard in enumerate(shards.shards)
    ]
    return replace(shards, shards=tuple(changed))


def _flipped(shard: Sequence[Example]) -> tuple[Example, ...]:
    """Exchange the last answers of examples of one text."""
    texts = [text for example in shard for text in example.texts]
    answers = [text.ids[slice(*text.spans[-1])] for text in texts]
    flipped = []
    for place, (example, text) in enumerate(zip(shard, texts, strict=True)):
        others = answers[place + 1 :] + answers[:place]
        wrong = next((answer for answer in others if answer != answers[place]), answers[place])
        start = text.spans[-1][0]
        changed = Text(text.ids[:start] + wrong, (*text.spans[:-1], (start, start + len(wrong))))
        flipped.append(replace(example, texts=(changed,)))
    return tuple(flipped)
