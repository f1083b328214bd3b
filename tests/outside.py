"""A package that somebody else made: its files, and its entry points as an installer writes them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path


def install(
    folder: Path, module: str, source: str, points: Mapping[str, Mapping[str, str]], version: str = "0.3"
) -> Path:
    """Write a package into a folder of `sys.path`: {"methods": {"fedema": "FedEMA"}} offers one method."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(textwrap.dedent(source))
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n")
    groups = (
        f"[fedtune.{group}]\n" + "".join(f"{name} = {module}:{what}\n" for name, what in own.items())
        for group, own in points.items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
    return folder


FEDEMA = '''
    """FedEMA: the global adapter is a moving average of the rounds' means."""

    from collections.abc import Sequence

    from pydantic import Field
    from torch import Tensor

    from fedtune.lora.state import to_tensors
    from fedtune.methods import ClientUpdate, Method, ServerState


    class FedEMA(Method):
        """The weighted mean of a round moves the global adapter by a part of the way only."""

        name = "fedema"
        title = "FedEMA: moving average of the rounds' means"
        paper = "none"

        class Parameters(Method.Parameters):
            """The part of the global adapter that stays.

            Attributes:
                decay: from 0 (the mean takes its place) to below 1.
            """

            decay: float = Field(0.5, gt=0, lt=1)

        parameters: Parameters

        def combine(self, updates: Sequence[ClientUpdate], state: ServerState) -> dict[str, Tensor]:
            """Return the average of what there is and the mean of what came."""
            kept, before = self.parameters.decay, to_tensors(state.adapter)
            mean = super().combine(updates, state)
            return {name: kept * before[name] + (1 - kept) * tensor for name, tensor in mean.items()}
'''
