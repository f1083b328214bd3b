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
    from dataclasses import replace

    from pydantic import Field

    from fedtune.lora.state import to_tensors, with_tensors
    from fedtune.methods import ClientUpdate, Method, RoundContext, ServerState


    class FedEMA(Method):
        """The weighted mean of a round moves the global adapter by a part of the way only."""

        name = "fedema"
        title = "FedEMA: moving average of the rounds' means"
        paper = "none"
        guarantee = "none"
        linear = True

        class Parameters(Method.Parameters):
            """`decay`: the part of the global adapter that stays, between 0 (none) and 1 (all)."""

            decay: float = Field(0.5, gt=0, lt=1)

        parameters: Parameters

        def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
            """Return the average of what there is and the mean of what came."""
            kept, before = self.parameters.decay, to_tensors(state.adapter)
            after = super().server_step(updates, state, context)
            moved = {n: kept * before[n] + (1 - kept) * t for n, t in to_tensors(after.adapter).items()}
            return replace(after, adapter=with_tensors(after.adapter, moved))
'''
