"""Data sets of the Hugging Face Hub: pinned, cached, and with an error that says what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fedtune.data.files import Row
from fedtune.types import DataError, FedtuneError, ModelError, OfflineError

T = TypeVar("T")
# errors of no connection, by the names that the Hub's libraries and Python have for them
_OFFLINE = re.compile(
    r"OfflineModeIsEnabled|LocalEntryNotFoundError|MaxRetryError|NameResolutionError|gaierror|TimeoutError"
    r"|(Read|Connect)Timeout|(Proxy|Connect|Connection(Refused|Reset|Aborted)?)Error"
)


@dataclass(frozen=True)
class HubSet:
    """One split of a data set on the Hub.

    Attributes:
        id: `organisation/name`.
        split: of the data set.
        config: its configuration ("subset"), if it has several.
        revision: a commit; empty means whatever `main` is today, and a run trained on that cannot be ranked.
    """

    id: str
    split: str
    config: str = ""
    revision: str = ""


def is_commit(revision: str) -> bool:
    """Tell whether a revision is a commit, which never moves, and not a branch or a tag."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def explain(error: BaseException, what: str, failure: type[FedtuneError]) -> FedtuneError:
    """Turn an error of the Hub's libraries into one that names the cause and the remedy."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    names = {type(e).__name__ for e in chain}
    offline = any(map(_OFFLINE.fullmatch, names))
    if "GatedRepoError" in names:
        return failure(f"{what} is gated: accept its terms on the Hub, then run `hf auth login` on this machine")
    if "RevisionNotFoundError" in names:
        return failure(f"{what}: that revision is gone; the repository was moved or rewritten. Pin another one")
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} and not offline:
        return failure(f"{what} does not exist, was moved, or is private; check the id (and `hf auth login`)")
    said = " ".join(str(error).split())
    if offline:
        return OfflineError(
            f"{what} is not in the local cache and the Hub cannot be reached"
            + (" (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else "")
            + f": {said}. Fetch it once on a connected machine and copy HF_HOME, or use "
            + ("a local folder in its place." if failure is ModelError else "--data FOLDER, or packaged data.")
        )
    if local := next((e for e in chain if isinstance(e, OSError) and e.errno is not None), None):
        return failure(f"{what}: {_of_the_system(local)}")
    return failure(f"{what}: {said}" if isinstance(error, OSError) else f"{what}: {type(error).__name__}: {said}")


def _of_the_system(error: OSError) -> str:
    """Say what the file system refused, and what to do."""
    full = "free some space, or set HF_HOME and FEDTUNE_CACHE to another disk"
    closed = "it must be readable, and the cache (HF_HOME, FEDTUNE_CACHE) writable"
    remedy = {errno.ENOSPC: full, errno.EDQUOT: full, errno.EACCES: closed, errno.EPERM: closed}
    remedy[errno.EROFS] = "set HF_HOME and FEDTUNE_CACHE to a folder that can be written"
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror}{where}" + (f"; {remedy[error.errno]}" if error.errno in remedy else "")


def guarded(call: Callable[[], T], what: str, failure: type[FedtuneError]) -> T:
    """Run a call into the Hub's libraries and translate what it raises."""
    try:
        return call()
    except FedtuneError:
        raise
    except Exception as err:
        raise explain(err, what, failure) from err


def load(source: HubSet) -> list[Row]:
    """Return the rows of a split, from the Hub's cache where it is there.

    Raises:
        OfflineError: not cached and not reachable.
        DataError: gated, moved, missing, or needing code to load.
    """

    def call() -> list[Row]:
        import datasets

        loaded: Any = datasets.load_dataset(
            source.id, source.config or None, split=source.split, revision=source.revision or None
        )
        return [dict(row) for row in loaded]

    return guarded(call, f"data set {source.id}", DataError)
