"""How a command ends where scores that it was to give are withheld: what there is stays written."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.types import DataError, RunFailedError


def check(reasons: Mapping[str, str], asked: int) -> None:
    """Say which scores are withheld, and why.

    Args:
        reasons: of each score that is withheld.
        asked: how many scores there are with those that are known.

    Raises:
        RunFailedError: all are withheld. DataError: some are.
    """
    if not reasons:
        return
    listed = "".join(f"\n  {name}: {why}" for name, why in reasons.items())
    if len(reasons) == asked:
        raise RunFailedError(f"score withheld:{listed}" if asked == 1 else f"all {asked} scores withheld:{listed}")
    raise DataError(f"score withheld ({len(reasons)} of {asked} scores):{listed}")
