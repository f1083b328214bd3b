"""Split rows over clients with Flower's partitioners (`flwr-datasets`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedtune.data.check import TrainRow
from fedtune.types import DataError, Problem, counted, derive_seed, nearest

KINDS = {
    "iid": "equal contiguous shards of the shuffled rows, exactly as FlowerTune's template makes them",
    "dirichlet:ALPHA": "each client's shares of the partition column's values, from Dirichlet(ALPHA); small is skewed",
    "natural": "one client for each value of the partition column, largest first, as many as there are clients",
    "shards:K": "rows sorted by the partition column, in equal shards (the rest is left out), K shards per client",
    "linear": "sizes proportional to 1, 2, 3 …",
    "square": "sizes proportional to 1, 4, 9 …",
    "exponential": "sizes proportional to e^1, e^2 …",
}

_WHOLE = re.compile(r"[0-9]{1,9}")
_DECIMAL = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?")
# beyond these a draw from the Dirichlet distribution is 0/0 in floating point
SMALLEST, LARGEST = 1e-6, 1e9


def parse(spec: str) -> tuple[str, str]:
    """Split `kind:argument`."""
    kind, _, argument = spec.partition(":")
    return kind, argument


def problems(spec: str) -> list[Problem]:
    """Return what is wrong with a partition's name, if anything."""
    kind, argument = parse(spec)
    where = f'data.partition = "{spec}"'
    known = {k.partition(":")[0]: k for k in KINDS}
    if kind not in known:
        return [Problem(where, "unknown partition", nearest(kind, known) or f"one of {', '.join(KINDS)}")]
    wants = ":" in known[kind]
    if not wants:
        return [Problem(where, "takes no argument", f"write {kind}")] if ":" in spec else []
    if kind == "shards" and not (_WHOLE.fullmatch(argument) and int(argument) > 0):
        return [Problem(where, f"{argument!r} is not a whole number above 0", f"write {known[kind]}, as in shards:2")]
    if not (_DECIMAL.fullmatch(argument) and SMALLEST <= float(argument) <= LARGEST):
        fix = f"write {known[kind]}, as in {kind}:0.3"
        return [Problem(where, f"{argument!r} is not a number from {SMALLEST:g} to {LARGEST:g}", fix)]
    return []


def _partitioner(spec: str, clients: int, seed: int) -> Any:
    from flwr_datasets import partitioner as flower

    kind, argument = parse(spec)
    sized = {
        "iid": flower.IidPartitioner,
        "linear": flower.LinearPartitioner,
        "square": flower.SquarePartitioner,
        "exponential": flower.ExponentialPartitioner,
    }
    if kind in sized:
        return sized[kind](num_partitions=clients)
    keyed = {"num_partitions": clients, "partition_by": "group", "seed": derive_seed(seed, kind) % 2**32}
    if kind == "shards":
        return flower.ShardPartitioner(**keyed, num_shards_per_partition=int(argument))
    return flower.DirichletPartitioner(**keyed, alpha=float(argument), min_partition_size=0, self_balancing=False)


def _natural(rows: Sequence[TrainRow], table: Any, clients: int) -> list[list[int]]:
    sizes = Counter(r.group for r in rows)
    if len(sizes) < clients:
        raise DataError(f"the partition column has {counted(len(sizes), 'value')}, fewer than the {clients} clients")
    chosen = sorted(sizes, key=lambda g: (-sizes[g], g))[:clients]
    members: dict[str, list[int]] = {g: [] for g in chosen}
    for index, group in zip(table["row"], table["group"], strict=True):
        if group in members:
            members[group].append(index)
    return [members[g] for g in chosen]


def _check_keys(rows: Sequence[TrainRow], spec: str) -> None:
    """Refuse a partition column with nothing to split by: one value, or values that hardly occur twice."""
    sizes = Counter(r.group for r in rows)
    if len(sizes) < 2:
        raise DataError(
            f"partition {spec!r} needs a partition column with at least two values; this set has {len(sizes)}"
        )
    # where one site has many rows and most have one, `natural` still has its sites
    repeats = max(sizes.values()) > 1 if spec == "natural" else len(sizes) * 2 <= len(rows)
    if not repeats:
        raise DataError(
            f"partition {spec!r} needs a partition column whose values repeat; "
            f"this set has {len(sizes)} values in {len(rows)} rows. "
            "Is the column free text? Use iid, linear, square or exponential, or another column"
        )


def partition(rows: Sequence[TrainRow], spec: str, clients: int, seed: int) -> list[list[int]]:
    """Assign rows to clients.

    Args:
        rows: all training rows, in the source's order.
        spec: one of `KINDS`.
        seed: of the shuffle before the split (FlowerTune's is 42) and of the partitioner's draws.

    Returns:
        For each client the indices into `rows`, in the order its trainer sees them. A client may be empty.

    Raises:
        DataError: the key is missing, or the split is impossible.
    """
    import datasets

    if found := problems(spec):
        raise DataError(str(found[0]))
    kind, argument = parse(spec)
    if kind in ("natural", "dirichlet", "shards"):
        _check_keys(rows, spec)
    if kind == "shards" and int(argument) * clients > len(rows):
        wanted = f"{argument} shards for each of {clients} clients"
        raise DataError(f"partition {spec!r}: {wanted} are {int(argument) * clients}, more than the {len(rows)} rows")
    table = datasets.Dataset.from_list([{"group": r.group, "row": i} for i, r in enumerate(rows)]).shuffle(seed=seed)
    if kind == "natural":
        return _natural(rows, table, clients)
    splitter = _partitioner(spec, clients, seed)
    splitter.dataset = table
    # `Dataset.shard` cannot make an empty shard; with fewer rows than clients the last ones have none
    filled = min(clients, len(rows)) if kind == "iid" else clients
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # sizes beyond all numbers are refused just the same
            loaded = [list(splitter.load_partition(i)["row"]) for i in range(filled)]
    except (ValueError, IndexError, KeyError, ArithmeticError) as err:
        reason = " ".join(str(err).split())[:200]
        raise DataError(f"partition {spec!r} over {clients} clients of {len(rows)} rows: {reason}") from err
    return loaded + [[] for _ in range(clients - filled)]


def table(rows: Sequence[TrainRow], shards: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Return, for each client, how many rows it has of each value of the partition column."""
    return [dict(sorted(Counter(rows[i].group for i in shard).items())) for shard in shards]
