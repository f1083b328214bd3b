"""A space of another package: listed, named, or refused with the reason."""

from collections.abc import Callable

import pytest

from fedtune.config import Settings
from fedtune.spaces import SPACES
from fedtune.types import ConfigError
from tests.spaces.test_docs import EXAMPLE
from tests.test_plugins import Offer, lines, offer  # noqa: F401


def test_a_space_of_another_package_is_listed_and_named(
    offer: Offer,  # noqa: F811
    made: Callable[..., Settings],
) -> None:
    package = offer(EXAMPLE, spaces={"norms": "Norms"}).replace("_", "-")
    row = next(r for r in lines("ls", "spaces") if r["space"] == "norms")
    assert (row["package"], row["saved as"]) == (f"{package} 0.3", "model/")
    assert made("norms").unranked[-1] == f"the space norms comes from the package {package} 0.3"


def test_what_is_no_space_is_refused_with_the_reason(
    offer: Offer,  # noqa: F811
    made: Callable[..., Settings],
) -> None:
    offer("Norms = 3\n", spaces={"norms": "Norms"})
    assert "norms" not in SPACES
    with pytest.raises(ConfigError, match=r"3 is no subclass of fedtune\.spaces\.Space"):
        made("norms")
