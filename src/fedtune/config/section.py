"""A table of settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedtune.types import Problem, nearest


class Section(BaseModel):
    """A table of settings: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Chosen(BaseModel):
    """Something chosen by its name, with settings of its own, checked against what it declares."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """Its own settings, without its name."""
        return dict(self.model_extra or {})


def own_problems(table: str, chosen: str, kind: type[Section], given: Mapping[str, Any]) -> Iterable[Problem]:
    """Yield what is wrong with the settings given in a table for what was chosen by name, which declares `kind`."""
    try:
        kind.model_validate(given)
    except ValidationError as err:
        for error in err.errors():
            # what is wrong with several together has no place of its own
            where = ".".join(map(str, (table, *error["loc"][:1])))
            if error["type"] == "extra_forbidden":
                fix = nearest(str(error["loc"][0]), kind.model_fields) or f"{chosen} has no such setting"
                yield Problem(where, "unknown key", fix)
            else:
                shown = f" = {error['input']!r:.200}" if error["loc"] else ""
                yield Problem(where + shown, error["msg"].removeprefix("Value error, "))
