"""Settings of the rows: where they come from, how they are split over the clients, and how each becomes text."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from fedtune.config.section import Section

# what looks like a place in a template
PLACE = re.compile(r"\{(\w[\w. -]*)\}")
FILLED = "a template has the places {instruction} and {response}"
INPUT = f'{FILLED}, and prompt.input = "instruction+input" puts the input into the first'


class DataSettings(Section):
    """Where the rows come from (on the Hub: at which commit) and how they are split over the clients."""

    source: Literal["packaged", "hub", "folder"] = "packaged"
    path: str = ""
    revision: str = ""
    partition: str = "iid"
    shuffle_seed: int = 42
    limit: int = Field(0, ge=0)
    balance: bool = False
    max_chars: int = Field(100_000, ge=100)


class PromptSettings(Section):
    """How a row becomes text. The template is filled in one pass; data is never read as a template."""

    template: str = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n### Instruction:\n{instruction}\n### Response: {response}"
    )
    input: Literal["instruction", "input", "instruction+input"] = "instruction+input"

    @field_validator("template")
    @classmethod
    def _has_places(cls, value: str) -> str:
        places = PLACE.findall(value)
        if unknown := [name for name in places if name not in ("instruction", "response")]:
            raise ValueError(f"has {{{unknown[0]}}}, which nothing fills: {INPUT if unknown[0] == 'input' else FILLED}")
        if places != ["instruction", "response"] or not value.endswith("{response}") or "{{" in value:
            raise ValueError("must have {instruction} once and end with {response}")
        return value
