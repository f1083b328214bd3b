"""What a robust rule and a clip make of a round's updates: the same updates with other weights, or without any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune import spaces
from fedtune.lora import algebra, product
from fedtune.lora.state import AdapterState, Plain, to_tensors
from fedtune.methods.base import Method
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState
from fedtune.methods.traits import by_product, comparable
from fedtune.methods.wrappers import rules
from fedtune.methods.wrappers.base import Having, Idle, Wrapper
from fedtune.types import Problem, RunFailedError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config
    from fedtune.config.schema import RobustSettings

NOBODY = -1  # stands for no client: the model as it was


def _balanced(update: ClientUpdate, whole: AdapterState) -> ClientUpdate:
    """Return an update with both factors of a layer made from their product, in float64; one alone stays.

    How a client splits its product, and what cancels in it, then reaches neither the rule nor the model.
    """
    factors = {path: to_tensors({path: module}) for path, module in whole.items()}
    split = {
        path: product.balanced(whole[path]) for path, names in factors.items() if names.keys() <= update.tensors.keys()
    }
    return replace(update, tensors={**update.tensors, **to_tensors(split)})


def _compared(
    method: Method, updates: Sequence[ClientUpdate], state: ServerState, round_: int
) -> tuple[list[ClientUpdate], Tensor]:
    """Return the updates, their factors balanced if they have any, and the inner products of what they change."""
    if isinstance(state.adapter, Plain):
        before = {name: tensor.double() for name, tensor in to_tensors(state.adapter).items()}
        changes = [{name: t.double() - before[name] for name, t in u.tensors.items()} for u in updates]
        return list(updates), algebra.gram(changes)
    whole = method.adapters(updates, state, round_)
    balanced = [_balanced(u, adapter) for u, adapter in zip(updates, whole, strict=True)]
    sent = {path: product.minus(product.precise(m)) for path, m in state.adapter.items()}
    changed = [
        {path: product.total(product.precise(m), sent[path]) for path, m in adapter.items()}
        for adapter in method.adapters(balanced, state, round_)
    ]
    return balanced, product.gram(changed)


def _weights(
    table: Tensor, updates: Sequence[ClientUpdate], settings: RobustSettings, note: Callable[[str], object]
) -> tuple[Tensor, float]:
    """Return the updates' weights, and that of the unchanged model, from their inner products.

    Under a rule every client counts as one: an example count is a client's own word, and a rule that took it would let
    one client be a majority.
    """
    ruled = settings.rule != "none"
    weights = table.new_tensor([1.0 if ruled else float(u.examples) for u in updates])
    if ruled:
        told = {"note": note} if settings.rule in rules.ITERATING else {}
        weights = rules.RULES[settings.rule](table, weights, settings, **told)
    if settings.clip_norm == "none":
        return weights, 0.0
    return rules.clip_shares(table, weights, 0.0 if settings.clip_norm == "median" else float(settings.clip_norm))


def reweighted(
    method: Method,
    updates: Sequence[ClientUpdate],
    state: ServerState,
    settings: RobustSettings,
    context: RoundContext,
) -> list[ClientUpdate]:
    """Return the updates with the weights that the settings give them; those without any are left out, with a note.

    Args:
        method: whose updates they are.
        updates: of the round, enough of them for the rule.
        state: before the round.
        settings: the rule, the clip, and how many of these updates may be malicious.
        context: the round; its note is told who was left out.
    """
    dtypes = [{n: t.dtype for n, t in u.tensors.items()} for u in updates]
    updates, table = _compared(method, updates, state, context.round)
    weights, rest = _weights(table, updates, settings, context.note)
    kept = [
        replace(u, tensors={n: t.to(own[n]) for n, t in u.tensors.items()}, examples=float(w))
        for u, own, w in zip(updates, dtypes, weights, strict=True)
        if float(w) > 0
    ]
    used = {u.client for u in kept}
    if out := [str(u.client) for u in updates if u.client not in used]:
        which = f'rule = "{settings.rule}"' if settings.rule != "none" else f'clip_norm = "{settings.clip_norm}"'
        context.note(f"robust.{which} gave no weight to the updates of clients {', '.join(out)}")
    if rest > 0:  # what was clipped off counts for the unchanged model, of the global rank
        kept.append(ClientUpdate(NOBODY, method.upload(state, NOBODY, context.round).tensors, rest))
    return kept


class Robust(Wrapper):
    """Gives the method the updates with the weights of a rule, a clip, or both."""

    name = "robust"
    one_by_one = True

    @classmethod
    def asked(cls, config: Config, kind: type[Method]) -> bool:
        """With `robust.rule` or `robust.clip_norm`."""
        return (config.robust.rule, config.robust.clip_norm) != ("none", "none")

    @classmethod
    def problems(cls, config: Config, kind: type[Method], having: Having) -> Iterable[Problem]:
        """Yield why a robust rule or a clip would not hold what it promises."""
        where, fix = "robust", f"these are made of the clients' products alone: {having(by_product)}"
        if not comparable(kind):
            yield Problem(where, f"an update of {kind.name} cannot be compared with others", fix)
        elif not by_product(kind) and (spaces.of(config).factored or not kind.linear):
            yield Problem(where, f"the model of {kind.name} is not bounded by what a rule lets through", fix)
        if config.lora.dora:
            yield Problem(where, "rules see products, not DoRA's magnitudes, which a client could set as it likes")
        if config.drift.scaffold:
            yield Problem(where, "rules do not see SCAFFOLD's control variates, which every client's update changes")
        asked = config.federation.cohort_size
        if asked < rules.fewest(config.robust):
            fix = "ask more clients: federation.clients, federation.fraction"
            yield Problem(where, f"{rules.needs(config.robust)}, and {asked} are asked", fix)

    @classmethod
    def idle(cls, config: Config, kind: type[Method]) -> Idle:
        """Name the settings that the chosen rule does not use."""
        robust = config.robust
        if robust.rule not in ("geometric-median", "trimmed"):
            yield "robust.iterations", f'only geometric-median and trimmed iterate, and robust.rule = "{robust.rule}"'
        if robust.rule not in rules.COUNTING and robust.clip_norm != "median":
            yield "robust.malicious", f'no count of clients is needed with robust.rule = "{robust.rule}"'
        if robust.rule in rules.DROPPING and not robust.malicious:
            yield "robust.malicious", f'robust.rule = "{robust.rule}" drops as many clients, so it drops none'
        if config.federation.cohort_size == 1:
            alone = "one client is asked per round, so there is nothing to compare it with"
            yield "robust.rule", alone
            if robust.clip_norm == "median":
                yield "robust.clip_norm", alone
        if robust.rule != "none":
            yield "federation.weights", "a robust rule counts clients and not examples"

    def shortage(self, updates: int, refused: int = 0) -> str:
        """Say that there are too few updates for the rule to mean anything."""
        left = rules.remaining(self.config.robust, updates, refused)
        few = updates < rules.fewest(left) and rules.counts(left)
        return f"{rules.needs(left)}; {updates} came" if few else self.inner.shortage(updates, refused)

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Give each update the weight it deserves.

        Raises:
            RunFailedError: fewer updates than the rule needs.
        """
        settings, refused = self.config.robust, context.refused
        if short := self.shortage(len(updates), refused):
            raise RunFailedError(short)
        left = rules.remaining(settings, len(updates), refused)
        if left.malicious < settings.malicious:
            caught = settings.malicious - left.malicious
            context.note(
                f"{caught} refused of the {settings.malicious} malicious: robust.malicious = {left.malicious} here"
            )
        return self.inner.server_step(reweighted(self.method, updates, state, left, context), state, context)
