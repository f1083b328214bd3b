"""Scripted attackers, to show what a method or a robust rule resists. They act on what a client would have sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune import spaces
from fedtune.lazy import torch
from fedtune.lora import dora
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors
from fedtune.methods.traits import sends_pairs
from fedtune.methods.wrappers.base import Having, Idle, Wrapper
from fedtune.names import CHOSEN, A, B
from fedtune.types import Problem, derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config
    from fedtune.config.schema import AttackSettings

Attack = Callable[[dict[str, "Tensor"], Tensors, float, int], dict[str, "Tensor"]]


def _origins(payload: Tensors, start: Tensors) -> dict[str, Tensor]:
    """Return what was at the start in the places of what is sent: of the ranks chosen, else of the first ones."""
    found = {}
    for name, tensor in payload.items():
        known = start.get(name)
        for axis, size in enumerate(tensor.shape):
            if known is not None and known.dim() == tensor.dim() and size < known.shape[axis]:
                known = known.index_select(axis, payload.get(name + CHOSEN, torch.arange(size)))
        if known is not None and known.shape == tensor.shape:
            found[name] = known
    return found


def _moved(payload: dict[str, Tensor], start: Tensors, factor: float) -> dict[str, Tensor]:
    """Return start + factor (sent - start); a tensor that has no start is scaled."""
    return {n: start[n] + factor * (t - start[n]) if n in start else factor * t for n, t in payload.items()}


def sign_flip(payload: dict[str, Tensor], start: Tensors, scale: float, seed: int) -> dict[str, Tensor]:
    """Send the opposite of the update, `scale` times as large."""
    return _moved(payload, start, -scale)


def boost(payload: dict[str, Tensor], start: Tensors, scale: float, seed: int) -> dict[str, Tensor]:
    """Send `scale` times the update, to replace the mean (arXiv 1807.00459)."""
    return _moved(payload, start, scale)


def random(payload: dict[str, Tensor], start: Tensors, scale: float, seed: int) -> dict[str, Tensor]:
    """Send Gaussian noise with `scale` times the norm of each tensor's update."""
    sent = {}
    for name, tensor in payload.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "noise", name))
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        change = tensor - start[name] if name in start else tensor
        size = scale * change.norm() / noise.norm().clamp(min=1e-30)
        sent[name] = start.get(name, 0) + noise * size
    return sent


def gauge(payload: dict[str, Tensor], start: Tensors, scale: float, seed: int) -> dict[str, Tensor]:
    """Send the same model in another gauge, (B scale, A / scale): no norm of the update shows it.

    A client that sends one factor alone has no gauge to choose.
    """
    sent = dict(payload)
    for name in payload:
        other = name.replace(A, B)
        if name.endswith(A) and other in payload:
            sent[name], sent[other] = payload[name] / scale, payload[other] * scale
    return sent


ATTACKS: dict[str, Attack] = {"sign-flip": sign_flip, "boost": boost, "random": random, "gauge": gauge}


def tampered(
    payload: dict[str, Tensor], start: Tensors, settings: AttackSettings, client: int, seed: int
) -> dict[str, Tensor]:
    """Return what a client sends: its payload, or what an attacker makes of it."""
    if client not in settings.clients or settings.kind not in ATTACKS:
        return payload
    floats = {n: t for n, t in payload.items() if t.is_floating_point()}
    return {**payload, **ATTACKS[settings.kind](floats, _origins(payload, start), settings.scale, seed)}


class Attackers(Wrapper):
    """Changes what some clients send."""

    name = "attack"

    @classmethod
    def asked(cls, config: Config, kind: type[Method]) -> bool:
        """With `attack.kind` and `attack.clients`."""
        return config.attack.kind != "none" or bool(config.attack.clients)

    @classmethod
    def problems(cls, config: Config, kind: type[Method], having: Having) -> Iterable[Problem]:
        """Refuse half an attack, and attackers that do not exist."""
        attack, clients = config.attack, config.federation.clients
        if (attack.kind == "none") != (not attack.clients):
            yield Problem("attack", "needs both a kind and clients, or neither")
        if [c for c in attack.clients if not 0 <= c < clients]:
            yield Problem(f"attack.clients = {list(attack.clients)}", f"there are clients 0 to {clients - 1}")

    @classmethod
    def idle(cls, config: Config, kind: type[Method]) -> Idle:
        """Name sizes that an attack does not have, and a gauge that a client cannot choose."""
        chosen = config.attack.kind
        if chosen in ("none", "label-flip"):
            yield "attack.scale", f'attack.kind = "{chosen}" has no size'
        if chosen in ("boost", "gauge") and config.attack.scale == 1:
            yield "attack.scale", f'attack.kind = "{chosen}" multiplies by it, and an attacker would be honest'
        if chosen == "gauge" and not spaces.of(config).factored:
            yield "attack.kind", f'with peft.kind = "{config.peft.kind}" there are no factors, so there is no gauge'
        elif chosen == "gauge" and not sends_pairs(kind):
            yield "attack.kind", f"a client of {kind.name} does not send both factors of a layer, so it has no gauge"

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Tamper with what is sent, compared with the start in the form that is sent.

        Magnitudes are those it would have sent or, where no server takes these, the nearest.
        """
        fitted = yield from self.inner.fit(client, start)
        if client.client not in self.config.attack.clients:
            return fitted
        seed = derive_seed(self.config.seed, "attack", client.client, client.round)
        was = yield from self.inner.untrained(start)
        bad = tampered(fitted.payload, was, self.config.attack, client.client, seed)
        return replace(fitted, payload=dora.clamped(bad, start))
