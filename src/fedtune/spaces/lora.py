"""LoRA: low-rank factors beside frozen weights (arXiv 2106.09685); rsLoRA and DoRA by the settings in `lora`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import Config
from fedtune.config.schema import LoraSettings
from fedtune.models.adapter_config import AdapterConfig, LoraAdapterConfig
from fedtune.models.source import CONFIG, WEIGHTS
from fedtune.models.zoo import zoo
from fedtune.names import A, B, M
from fedtune.spaces.base import Space
from fedtune.spaces.saved import Layers, by_layer, config_problems, layer_problems, linears
from fedtune.types import AdapterError

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState
    from fedtune.models.adapted import AdaptedModel
    from fedtune.models.folder import FolderState
    from fedtune.models.load import LoadedModel
    from fedtune.results.entry import Entry


class Lora(Space):
    """Factors A and B of each target layer."""

    name = "lora"
    title = "LoRA, rsLoRA, DoRA"
    paper = "arXiv:2106.09685"
    factored = True
    unsubmitted = ""

    def attach(self, base: LoadedModel, config: Config, seed: int) -> AdaptedModel:
        """Put a fresh adapter on the layers of `lora.target_modules`."""
        from fedtune.models.adapter import attach

        return attach(base, config.lora, seed)

    def save(self, adapted: AdaptedModel, state: AdapterState, folder: Path) -> None:
        """Write a PEFT folder."""
        from fedtune.models.adapter import save

        save(adapted, state, folder)

    def opened(self, folder: Path) -> FolderState:
        """Open a PEFT folder, layer by layer."""
        from fedtune.models.folder import FolderState

        return FolderState(folder)

    def layers(self, header: Mapping[str, Any]) -> Saved:
        """Return (in, out, rank) of each layer's factors."""
        parts = by_layer(header, (A, B, M), "factor")
        found = Saved({path: _shape(path, own) for path, own in parts.items()})
        found.magnitudes = frozenset(path for path, own in parts.items() if M in own)
        return found

    def on_base(self, entry: Entry) -> Layers | None:
        """Return (in, out) of the layers that `lora.target_modules` names, by default PEFT's."""
        base = zoo().get(entry.base)
        return linears(entry, entry.settings.lora.target_modules or (base.targets if base else ()))

    def numbers(self, shape: Sequence[int], config: Config) -> tuple[int, int, int]:
        """Count those of A, of B, and DoRA's magnitudes, at the rank of the settings."""
        lora = config.lora
        return shape[0] * lora.r, shape[1] * lora.r, shape[1] if lora.dora else 0

    def saved_problems(
        self, config: AdapterConfig, layers: Layers, entry: Entry, *, grown: bool
    ) -> Iterator[tuple[str, str]]:
        """Yield another rank, scale, dropout or base model, and layers that the settings do not make."""
        lora = entry.settings.lora
        if not isinstance(config, LoraAdapterConfig) or not isinstance(layers, Saved):
            yield CONFIG, f"is of kind {config.kind}, the settings say LoRA"
            return
        yield from config_problems(config, layers, entry)
        yield from ((CONFIG, why) for why in _own_problems(config, layers, lora, grown=grown))
        found = {path: shape[:2] for path, shape in layers.items()}
        yield from layer_problems(found, self.on_base(entry), set(lora.target_modules), "lora.target_modules")
        # a method that moves the base model leaves a rank of at most a layer's full one
        full = max((min(i, o) for i, o, _ in layers.values()), default=0)
        least, most = (min(lora.r, full), max(lora.r, full)) if grown else (lora.r, lora.r)
        ranks = {rank for _, _, rank in layers.values()} or {0}
        if min(ranks) < least or max(ranks) > most:
            rank = min(ranks) if min(ranks) < least else max(ranks)
            yield WEIGHTS, f"has a layer of rank {rank}, the settings say {lora.r}"


class Saved(dict[str, tuple[int, ...]]):
    """(in, out, rank) of each adapted layer by its path; `magnitudes` are the layers that have DoRA's."""

    magnitudes: frozenset[str] = frozenset()


def _shape(path: str, own: Mapping[str, list[int]]) -> tuple[int, int, int]:
    a, b = own.get(A, []), own.get(B, [])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or own.get(M, b[:1]) != b[:1]:
        raise AdapterError(f"{path[:200]}: A is {a} and B {b}; they do not multiply")
    return a[1], b[0], a[0]


def _own_problems(config: LoraAdapterConfig, layers: Saved, lora: LoraSettings, *, grown: bool) -> Iterator[str]:
    """Yield what the adapter's settings say of its factors that its file or the run's settings do not."""
    if other := [path for path, (_, _, rank) in layers.items() if rank != config.r]:
        yield f"r is {config.r}, {other[0][:200]} has rank {layers[other[0]][2]}"
    yield from _scale_problems(config, lora, grown=grown)
    if config.lora_dropout != lora.dropout:
        yield f"lora_dropout is {config.lora_dropout}, the settings say {lora.dropout}"
    if config.use_dora != lora.dora or layers.magnitudes != (frozenset(layers) if lora.dora else frozenset()):
        yield f"the settings say dora = {str(lora.dora).lower()}, the adapter is another"


def _scale_problems(config: LoraAdapterConfig, lora: LoraSettings, *, grown: bool) -> Iterator[str]:
    """Yield an alpha or a kind of scale that no run of these settings leaves: only both together make the scale."""
    said = (config.lora_alpha, config.use_rslora)
    # what was moved into the base model has the scale 1, unless nothing was moved
    pairs = [(float(config.r), False)] if grown else []
    if not grown or config.r == lora.r:
        pairs.append((lora.alpha, lora.rslora))
    if said in pairs:
        return
    alpha, rslora = pairs[-1]
    if said[0] != alpha:
        yield f"lora_alpha is {said[0]}, the settings say {alpha}"
    if said[1] != rslora:
        yield f"use_rslora is {said[1]}, the settings say {rslora}"
