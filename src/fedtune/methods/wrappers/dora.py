"""DoRA's magnitudes between clients and server: bounded, and averaged exactly where a method can do that.

Under the exact map magnitudes travel relative to the rows' norms, and B multiplied by them; see `lora.dora`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.lora import dora
from fedtune.lora.state import AdapterState, to_tensors, with_tensors
from fedtune.methods import sound
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, RowNorms, Tensors
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Upload, weights
from fedtune.methods.traits import magnitudes
from fedtune.methods.wrappers.base import Having, Wrapper
from fedtune.names import B, M
from fedtune.types import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config


def magnitude_problem(tensors: Tensors, adapter: AdapterState, *, relative: bool) -> str:
    """Say which of DoRA's magnitudes has moved further than a round may move it, or return an empty string.

    Args:
        tensors: what a client sent.
        adapter: what it was sent.
        relative: magnitudes are relative, and B comes multiplied by them; it is bounded without.
    """
    if (problem := dora.outside(tensors, adapter)) or not relative:
        return problem
    plain, before = dora.from_wire(tensors), to_tensors(adapter)
    for name in (n for n in plain if n.endswith(B)):
        norm, limit = float(plain[name].norm()), float(before[name].norm()) + sound.GROWTH
        if not norm <= limit:
            return f"{name} has norm {norm:.3g} without its magnitudes; at most {limit:.3g} is taken"
    return ""


class DoRA(Wrapper):
    """Keeps magnitudes in bounds; maps them where the method is defined by products."""

    name = "dora"

    def __init__(self, inner: Method | Wrapper, config: Config) -> None:
        super().__init__(inner, config)
        self.exact = magnitudes(type(self.method)) == "exact"
        self.one_by_one = self.exact

    @classmethod
    def asked(cls, config: Config, kind: type[Method]) -> bool:
        """With `lora.dora`."""
        return config.lora.dora

    @classmethod
    def problems(cls, config: Config, kind: type[Method], having: Having) -> Iterable[Problem]:
        """Refuse methods that have no mean of magnitudes, and mixed ranks."""
        if not magnitudes(kind):
            yield Problem(
                "lora.dora", f"{kind.name} is not defined for DoRA's magnitudes", f"these are: {having(magnitudes)}"
            )
        if config.lora.ranks:
            yield Problem("lora.ranks", "mixed ranks are not defined together with DoRA")

    def _as_sent(self, adapter: AdapterState) -> AdapterState:
        """Return a fresh adapter in the form that travels: relative magnitudes are 1."""
        return with_tensors(adapter, dora.unit(to_tensors(adapter))) if self.exact else adapter

    def initial(self, adapter: AdapterState) -> ServerState:
        """Start in the form that travels."""
        return self.inner.initial(self._as_sent(adapter))

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Begin from a layout in the form that travels."""
        return self.inner.begin(replace(client, layout=self._as_sent(client.layout)), download)

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train with magnitudes as PEFT has them, and send what is accepted."""
        plain = yield from self.loadable(start)
        fitted = yield from self.inner.fit(client, plain)
        return replace(fitted, payload=(yield from self._mapped(fitted.payload, plain, start)))

    def untrained(self, start: Tensors) -> Program[dict[str, Tensor]]:
        """Return the start in the form in which it would be sent."""
        plain = yield from self.loadable(start)
        return (yield from self._mapped(dict(plain), plain, start))

    def loadable(self, tensors: Tensors) -> Program[dict[str, Tensor]]:
        """Return tensors with the magnitudes as PEFT has them."""
        return dora.to_magnitudes(tensors, (yield RowNorms(tensors))) if self.exact else dict(tensors)

    def _mapped(self, payload: dict[str, Tensor], plain: Tensors, start: Tensors) -> Program[dict[str, Tensor]]:
        """Return trained tensors as they are sent; no magnitude is further from `start` than is accepted."""
        if self.exact:
            return dora.to_wire(payload, (yield RowNorms({**plain, **payload})), start)
        return dora.clamped(payload, start)

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Bound magnitudes, and B where it comes multiplied by them, by how far they may move and not by their norm."""
        inner, own = self.inner.upload(state, client, round_, steps), (M, B)[: 1 + self.exact]

        def problem(sent: Tensors) -> str:
            return magnitude_problem(sent, state.adapter, relative=self.exact) or inner.problem(sent)

        return replace(
            inner,
            whole=lambda sent: inner.whole(dora.from_wire(sent) if self.exact else sent),
            growth=lambda name: sound.LARGEST if name.endswith(own) else inner.growth(name),
            problem=problem,
        )

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Average magnitudes exactly, or leave them to the method; none moves further than a round may move it."""
        relative: dict[str, Tensor] = {}
        if self.exact:
            tensors, relative = dora.divided([u.tensors for u in updates], weights(updates))
            updates = [replace(u, tensors=t) for u, t in zip(updates, tensors, strict=True)]
        after = self.inner.server_step(updates, state, context)
        moved = dora.clamped(to_tensors(after.adapter), to_tensors(state.adapter))
        return replace(after, adapter=with_tensors(after.adapter, {**moved, **relative}))
